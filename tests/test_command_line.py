"""What every script owes to whoever calls it: help, hints, exit statuses, two streams, and no colours unasked.

Scripts are found by looking, so a new one is held to the same.
"""

import dataclasses
import fcntl
import json
import os
import re
import runpy
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import tyro
from test_log import end

from benchmarks.__main__ import SETS, WITHOUT_DATA
from fashion_jax.log import Progress
from fashion_jax.script import run_script

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    path
    for folder in ("examples", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if 'if __name__ == "__main__":' in path.read_text()
]
EXAMPLE = ROOT / "examples" / "compare_overfit.py"
COMPARE = ROOT / "benchmarks" / "compare.py"
RECORD = next((ROOT / "benchmarks" / "records").glob("*/throughput.json")).parent
ESCAPE = "\x1b"


def flags_of(script: Path) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(runpy.run_path(str(script), run_name="looked at")["Flags"])


def spelled(field: dataclasses.Field) -> str:
    return "--" + field.name.replace("_", "-")


def is_positional(field: dataclasses.Field) -> bool:
    return "Positional" in str(field.type)


def test_every_example_is_a_script_or_a_notebook():
    others = set((ROOT / "examples").glob("*.py")) - set(SCRIPTS)
    assert all("# jupyter:" in path.read_text() for path in others)
    assert len(SCRIPTS) > 15


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_help_tells_every_flag_and_its_default(script, call):
    result = call(script, "--help")
    assert result.returncode == 0
    assert not result.stderr
    assert ESCAPE not in result.stdout
    told = " ".join(re.sub("[│╭╮╰╯─]", " ", result.stdout).split())
    if script.parent.name == "benchmarks":
        name = "benchmarks" if script.stem == "__main__" else f"benchmarks.{script.stem}"
        assert told.startswith(f"usage: python -m {name} ")
    assert " ".join(runpy.run_path(str(script), run_name="looked at")["__doc__"].split()) in told
    for field in flags_of(script):
        if is_positional(field):
            assert "positional arguments" in told
            continue
        found = re.search(rf" {spelled(field)}\b(?!-)(.*?)\(default: (.*?)\)", told)
        assert found, spelled(field)
        meaning, default = found.groups()
        assert len(meaning.split()) > 3, f"{spelled(field)} says too little: {meaning}"
        expected = field.default if isinstance(field.default, tuple) else [field.default]
        assert default.replace("'", "") == " ".join(map(str, expected))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_unknown_flag_ends_with_status_2_and_the_near_one(script, call):
    near = [spelled(field) for field in flags_of(script) if not is_positional(field)]
    wrong = near[-1][:-1] if near else "--nothing"
    # The words that a script asks for, so that the flag is all that is wrong.
    needed = ["x"] * sum(is_positional(field) and field.default is dataclasses.MISSING for field in flags_of(script))
    result = call(script, *needed, wrong)
    assert result.returncode == 2
    assert not result.stdout
    assert ESCAPE not in result.stderr
    assert re.search(rf"Unrecognized options: {wrong}\b", result.stderr)
    if near:
        assert re.search(rf"Perhaps you meant:.*{near[-1]}\b", result.stderr, re.DOTALL)


@pytest.mark.parametrize("device", SETS)
def test_sets_of_benchmarks_give_flags_that_there_are(device):
    for name, own in SETS[device].items():
        flags = runpy.run_path(str(ROOT / "benchmarks" / f"{name}.py"), run_name="looked at")["Flags"]
        data = [] if name in WITHOUT_DATA else ["--data-dir", "x"]
        given = tyro.cli(flags, args=[*own, *data, "--output", "y"])
        assert getattr(given, "device", device) == device


def run(*command, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("module", "flags", "results"),
    [
        ("compare", (RECORD, RECORD), r"(\|.*\|\n)+"),
        ("fuzz", ("--cases", 3, "--targets", "read_idx, gzip"), r"(\|.*\|\n)+3 damaged cases, 0 failures\n"),
    ],
)
def test_results_are_on_standard_output_and_notes_on_standard_error(tmp_path, module, flags, results):
    flags += ("--output", tmp_path) if module == "fuzz" else ()
    result = run("-m", f"benchmarks.{module}", *flags)
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(results, result.stdout), result.stdout
    assert result.stderr == ("" if module == "compare" else f"cpu: wrote {tmp_path}/fuzz.json\n")


def a_record(folder: Path, *, rows, flags) -> Path:
    folder.mkdir()
    record = {"rows": rows, "flags": flags, "environment": {"processor": "one"}}
    (folder / "saving.json").write_text(json.dumps(record))
    return folder


def test_what_else_differs_between_records_is_told(tmp_path, call):
    rows = [{"images": size, "program": "predict", "median (s)": 2.0 * size} for size in (1, 100)]
    old = a_record(tmp_path / "old", rows=rows, flags={"epochs": 4, "output": "a"})
    faster = [row | {"median (s)": row["median (s)"] / 4} for row in rows]
    new = a_record(tmp_path / "new", rows=faster, flags={"epochs": 8, "output": "b"})
    result = call(COMPARE, old, new)
    assert result.returncode == 0
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in result.stdout.splitlines()]
    assert cells[0] == ["benchmark", "row", "old (s)", "new (s)", "old / new"]
    assert cells[2:] == [["saving", "1, predict", "2", "0.5", "4"], ["saving", "100, predict", "200", "50", "4"]]
    assert result.stderr == "saving.json: --epochs was 4 and is 8\n"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"program": "fit", "median (s)": 1.0}] * 2, "two rows are called"),
        ([{"program": "fit", "median (s)": 0.0}], "is 0.0"),
        ([{"program": "fit", "median (s)": "soon"}], "could not convert"),
        ([None], "NoneType"),
    ],
)
def test_a_damaged_record_is_named(tmp_path, call, rows, message):
    good = a_record(tmp_path / "good", rows=[{"program": "fit", "median (s)": 1.0}], flags={})
    bad = a_record(tmp_path / "bad", rows=rows, flags={})
    result = call(COMPARE, good, bad)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {bad / 'saving.json'}: not a benchmark's record (")
    assert message in result.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--sizes", 1, 20_000), "error: --sizes must lie between 1 and 10,000, got (1, 20000)\n"),
        (("--seconds", "inf"), "error: --seconds must be positive and finite, got inf\n"),
    ],
)
def test_predict_is_not_timed_on_images_that_are_not_there(tmp_path, call, flags, message):
    result = call(ROOT / "benchmarks" / "predict.py", *flags, "--output", tmp_path / "out")
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.endswith(message)


def test_a_failure_ends_with_status_1_and_nothing_on_standard_output(tmp_path):
    result = run("-m", "benchmarks.compare", tmp_path, RECORD)
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr == f"error: {tmp_path} and {RECORD} have no timing in common\n"


def terminal() -> tuple[int, int]:
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
    return ours, theirs


def read_all(ours: int) -> str:
    content = b""
    try:
        while chunk := os.read(ours, 65536):
            content += chunk
    except OSError:
        # What Linux says when nobody holds the other end any more.
        pass
    os.close(ours)
    return content.decode()


@pytest.mark.parametrize(
    ("piped", "environment", "coloured"),
    [
        (None, {}, True),
        (None, {"NO_COLOR": "1"}, False),
        ("stderr", {}, False),
        ("stdout", {}, False),
    ],
)
def test_colours_are_for_terminals_and_not_for_who_refuses_them(piped, environment, coloured):
    ours, theirs = terminal()
    streams = {"stdout": theirs, "stderr": theirs} | ({piped: subprocess.PIPE} if piped else {})
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"} | environment
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLE), "--epoch", "3"], env=environment | {"TERM": "xterm"}, text=True, **streams
    )
    os.close(theirs)
    shown = read_all(ours)
    shown += "".join(filter(None, process.communicate()))
    assert process.returncode == 2
    assert "Perhaps" in shown
    assert (ESCAPE in shown) == coloured


@pytest.mark.parametrize("no_colour", [False, True])
def test_the_bar_has_no_colours(monkeypatch, no_colour):
    if no_colour:
        monkeypatch.setenv("NO_COLOR", "1")
    ours, theirs = terminal()
    with os.fdopen(theirs, "w") as file, Progress(3, file=file) as progress:
        for epoch in (1, 2, 3):
            progress(end(epoch))
    shown = read_all(ours)
    assert "3/3" in shown
    assert ESCAPE not in shown


def test_an_error_without_a_text_is_told_by_its_type(capsys):
    def main(flags):
        raise MemoryError

    with pytest.raises(SystemExit) as caught:
        run_script(main, lambda: None)
    assert caught.value.code == 1
    assert capsys.readouterr().err == "error: MemoryError()\n"


def test_sizes_that_are_none_are_not_the_presets(call, tmp_path):
    result = call(ROOT / "examples" / "dropout_sweep.py", "--sizes", "--output", tmp_path)
    assert result.returncode != 0
    assert "sizes" in result.stderr
