"""The tutorial's notebook: its cells are the script's, they run, and the stored outputs are fit to be read."""

import re
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

SCRIPT = Path(__file__).parents[1] / "examples" / "dropout_tutorial.py"
NOTEBOOK = SCRIPT.with_suffix(".ipynb")
# Part 4 takes a hundred batches of 64.
SHORT = "SEEDS = range(2)\nEPOCHS = 2\nIMAGES = 6_400"


@pytest.fixture(scope="module")
def stored():
    return nbformat.read(NOTEBOOK, as_version=4)


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(notebook) -> str:
    """All outputs except pictures."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    shown = [value for output in outputs for kind, value in output.get("data", {}).items() if "image" not in kind]
    return "\n".join([*(output.get("text", "") for output in outputs), *shown])


def assert_shows_what_it_should(notebook):
    for cell in code(notebook):
        assert {output.output_type for output in cell.outputs} <= {"stream", "display_data"}
        assert "stderr" not in {output.get("name") for output in cell.outputs}, cell.outputs
        shows = re.search(r"^ *(print|display|plt\.show)\(", cell.source, re.MULTILINE)
        assert bool(cell.outputs) == bool(shows), cell.source


def test_cells_are_those_of_the_script(stored):
    """If not, `make notebook`."""
    cells = [[(cell.cell_type, cell.source) for cell in n.cells] for n in (stored, jupytext.read(SCRIPT))]
    assert cells[0] == cells[1]


def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    notebook = jupytext.read(SCRIPT)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    names = [re.findall(r"^(\w+) =", source, re.MULTILINE) for source in (parameters.source, SHORT)]
    assert names[0] == names[1]
    parameters.source = SHORT
    for variable in ("IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(variable, str(tmp_path))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert_shows_what_it_should(notebook)


def test_stored_outputs_are_complete_and_clean(stored):
    nbformat.validate(stored)
    assert_shows_what_it_should(stored)
    assert [cell.execution_count for cell in code(stored)] == list(range(1, len(code(stored)) + 1))
    found = re.search(r"Traceback|Error|Warning|(?<![\w.:/])(/\w+){2}|\w:\\|\d\d:\d\d|it/s|%\|", text(stored))
    assert not found, f"tells of the machine or the time: {found}"
    assert stored.metadata.language_info == {"name": "python"}
    assert NOTEBOOK.stat().st_size < 1_000_000


def test_the_text_states_no_figure_that_is_not_shown(stored):
    prose = "\n".join(cell.source for cell in stored.cells if cell.cell_type == "markdown")
    shown = text(stored) + "\n".join(cell.source for cell in code(stored))
    assert [figure for figure in re.findall(r"\d+\.\d+", prose) if figure not in shown] == []


def test_the_table_has_the_answers_of_the_text(stored):
    """Rounding differs from machine to machine: if an answer does after `make notebook`, the text has to follow."""
    row = r"^\| (\w[^|]*?) +\| (supported|refuted|negligible|undecided)\b"
    answers = dict(re.findall(row, text(stored), re.MULTILINE))
    assert len(answers) == 7
    for claim in ("without dropout the validation loss turns early and rises", "with dropout it does not"):
        assert answers[claim] != "refuted", claim
    for claim in ("dropout raises accuracy", "dropout lowers the loss more than stopping early does"):
        assert answers[claim] != "supported", claim
    assert answers["dropout closes the gap"] == "refuted"
    assert answers["dropout narrows the gap"] == answers["dropout lowers the final validation loss"] == "supported"
