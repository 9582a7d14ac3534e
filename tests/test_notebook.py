"""The tutorial's notebook: its cells are the script's, they run, and the stored outputs are fit to be read."""

import re
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

SCRIPT = Path(__file__).parents[1] / "examples" / "dropout_tutorial.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
# Part 4 takes a hundred batches of 64.
SHORT = "SEEDS = range(2)\nEPOCHS = 2\nIMAGES = 6_400"

STORED = nbformat.read(NOTEBOOK, as_version=4)
CODE = [cell for cell in STORED.cells if cell.cell_type == "code"]
OUTPUTS = [output for cell in CODE for output in cell.outputs]
DATA = [value for output in OUTPUTS for kind, value in output.get("data", {}).items() if "image" not in kind]
SHOWN = "\n".join([*(output.get("text", "") for output in OUTPUTS), *DATA])


def assert_shows_what_it_should(notebook):
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        assert {output.output_type for output in cell.outputs} <= {"stream", "display_data"}
        assert "stderr" not in {output.get("name") for output in cell.outputs}, cell.outputs
        shows = re.search(r"^ *(print|display|plt\.show)\(", cell.source, re.MULTILINE)
        assert bool(cell.outputs) == bool(shows), cell.source


def test_runs_from_top_to_bottom_and_is_the_stored_one(tmp_path, monkeypatch):
    notebook = jupytext.read(SCRIPT)
    sources = [[(cell.cell_type, cell.source) for cell in each.cells] for each in (STORED, notebook)]
    assert sources[0] == sources[1], "make notebook"
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    names = [re.findall(r"^(\w+) =", source, re.MULTILINE) for source in (parameters.source, SHORT)]
    assert names[0] == names[1]
    parameters.source = SHORT
    for variable in ("IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert_shows_what_it_should(notebook)


def test_stored_outputs_are_complete_and_clean():
    nbformat.validate(STORED)
    assert_shows_what_it_should(STORED)
    assert [cell.execution_count for cell in CODE] == [*range(1, len(CODE) + 1)]
    found = re.search(r"Traceback|Error|Warning|(?<![\w.:/])(/\w+){2}|\w:\\|\d\d:\d\d|it/s|%\|", SHOWN)
    assert not found, f"tells of the machine or the time: {found}"
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_the_text_agrees_with_what_is_shown():
    """Rounding differs from machine to machine: if an answer does after `make notebook`, the text has to follow."""
    prose = "\n".join(cell.source for cell in STORED.cells if cell.cell_type == "markdown")
    visible = SHOWN + "\n".join(cell.source for cell in CODE)
    assert [figure for figure in re.findall(r"\d+\.\d+", prose) if figure not in visible] == []
    row = r"^\| (\w[^|]*?) +\| (supported|refuted|negligible|undecided)\b"
    answers = dict(re.findall(row, SHOWN, re.MULTILINE))
    assert len(answers) == 7
    assert answers["without dropout the validation loss turns early and rises"] != "refuted"
    assert answers["with dropout it does not"] != "refuted"
    assert answers["dropout raises accuracy"] != "supported"
    assert answers["dropout lowers the loss more than stopping early does"] != "supported"
    assert answers["dropout closes the gap"] == "refuted"
    assert answers["dropout narrows the gap"] == answers["dropout lowers the final validation loss"] == "supported"
