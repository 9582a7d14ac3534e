"""The epochs' figures as JSON lines: what a line says, what a kill leaves, and what a run that goes on adds."""

import dataclasses
import errno
import fcntl
import functools
import json
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import nbformat
import numpy as np
import optax
import pytest
from nbclient import NotebookClient

from fashion_jax import Batch, History, Metrics, TrainConfig, fit
from fashion_jax.checkpoint import Checkpoints
from fashion_jax.log import FIGURES, JsonLines
from fashion_jax.search import Setting, train_settings
from fashion_jax.sweep import sweep
from fashion_jax.train import EpochEnd

ROOT = Path(__file__).parents[1]
CONFIG = TrainConfig(hidden=(8,))


@pytest.fixture(scope="module")
def tiny(small) -> Batch:
    return Batch(*(leaf[:50] for leaf in small))


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "größe 1" / "log.jsonl"


def end(epoch: int, *, config=TrainConfig(), rates=(0.2,), lanes: int | None = None, value: float = 0.5) -> EpochEnd:
    leaf = np.full(() if lanes is None else (len(rates), lanes), value)
    history = History(leaf, Metrics(leaf, leaf), Metrics(leaf, leaf))
    seeds = None if lanes is None else tuple(range(lanes))
    return EpochEnd(epoch, 9, config, 50, rates, seeds, history, lambda: None)


def refuse_constant(name):
    raise AssertionError(f"{name} is no JSON")


def read(path: Path) -> list[dict]:
    content = path.read_text()
    assert content.endswith("\n") or not content
    return [json.loads(line, parse_constant=refuse_constant) for line in content.splitlines()]


def epochs(path: Path, **of) -> list[int]:
    return [line["epoch"] for line in read(path) if of.items() <= line.items()]


def figures(history: History) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in (history.running_loss, *history.train, *history.validation)]


def test_a_line_holds_the_figures_of_the_history(tiny, path):
    with JsonLines(path, seed=7, learning_rate=0.003, note="größe\u2028") as log:
        run = fit(tiny, tiny, key=jax.random.key(7), config=CONFIG, dropout_rate=0.2, epochs=3, on_epoch=log)
    lines = read(path)
    about = {"train_size": 50, "config": {"hidden": [8]}, "dropout_rate": 0.2}
    about |= {"seed": 7, "learning_rate": 0.003, "note": "größe\u2028"}
    assert [list(line.items())[:7] for line in lines] == [[("epoch", i), *about.items()] for i in (1, 2, 3)]
    for name, leaf in zip(FIGURES, figures(run.history), strict=True):
        assert [line[name] for line in lines] == leaf.tolist()


def test_a_sweep_has_a_line_a_network(tiny, path):
    seeds, rates = [3, 5], [0.0, 0.5]
    with JsonLines(path) as log:
        run = sweep(tiny, tiny, seeds=seeds, dropout_rates=rates, config=CONFIG, epochs=2, on_epoch=log)
    assert len(read(path)) == 8
    for name, leaf in zip(FIGURES, figures(run.history), strict=True):
        for i, rate in enumerate(rates):
            for j, seed in enumerate(seeds):
                of_lane = [line for line in read(path) if (line["dropout_rate"], line["seed"]) == (rate, seed)]
                assert [line["epoch"] for line in of_lane] == [1, 2]
                assert [line[name] for line in of_lane] == leaf[i, j].tolist()


def test_a_sweep_over_sizes_tells_them_apart(tiny, tmp_path, path):
    def stopping(end):
        log(end)
        if (end.train_size, end.epoch) == (40, 2):
            raise KeyboardInterrupt

    run = functools.partial(
        sweep, tiny, tiny, seeds=[3], dropout_rates=[0.0], train_sizes=[20, 40], config=CONFIG, epochs=3
    )
    with JsonLines(path) as log:
        run(on_epoch=stopping, checkpoint=tmp_path / "saved")
    with JsonLines(path) as log:
        history = run(on_epoch=log, checkpoint=tmp_path / "saved").history
    for i, size in enumerate((20, 40)):
        of_size = [line for line in read(path) if line["train_size"] == size]
        assert [line["epoch"] for line in of_size] == [1, 2, 3]
        assert [line["running_loss"] for line in of_size] == history.running_loss[i, 0, 0].tolist()


def test_a_search_tells_its_configs_apart(tiny, path):
    """By what differs from the usual config."""
    slower = dataclasses.replace(CONFIG, learning_rate=1e-4)
    settings = {"usual": Setting(CONFIG, 0.2, 2), "slower": Setting(slower, 0.2, 2)}
    with JsonLines(path) as log:
        runs = train_settings(tiny, tiny, settings=settings, seeds=[4], on_epoch=log)
    for name, config in (("usual", {"hidden": [8]}), ("slower", {"hidden": [8], "learning_rate": 1e-4})):
        of_setting = [line for line in read(path) if line["config"] == config]
        assert [line["epoch"] for line in of_setting] == [1, 2]
        assert [line["running_loss"] for line in of_setting] == runs[name].history.running_loss[0].tolist()


@pytest.mark.parametrize("lengths", [(1, 2), (2, 1)])
def test_a_search_logs_networks_that_it_trains_twice_once(tiny, tmp_path, path, lengths):
    """Settings that differ in their epochs alone; the search goes on after the shorter program was complete."""
    settings = {name: Setting(CONFIG, 0.2, length) for name, length in zip("ab", lengths, strict=True)}

    def stopping(end):
        log(end)
        if (end.epoch, end.epochs) == (1, 2):
            raise KeyboardInterrupt

    run = functools.partial(train_settings, tiny, tiny, settings=settings, seeds=[4, 5], checkpoint=tmp_path / "saved")
    with JsonLines(path) as log, pytest.raises(KeyboardInterrupt):
        run(on_epoch=stopping)
    with JsonLines(path) as log:
        runs = run(on_epoch=log)
    longer = runs["ab"[lengths.index(2)]].history
    for lane, seed in enumerate((4, 5)):
        assert epochs(path, seed=seed) == [1, 2]
        of_seed = [line["running_loss"] for line in read(path) if line["seed"] == seed]
        assert of_seed == longer.running_loss[lane].tolist()


def test_the_same_sweep_twice_is_refused_at_any_length(path):
    with JsonLines(path) as log:
        for length in (9, 2, 12):
            for epoch in (1, 2):
                log(end(epoch, lanes=1)._replace(epochs=length))
            with pytest.raises(ValueError, match=r"epoch 2 of .* was logged before"):
                log(end(2, lanes=1)._replace(epochs=length))
        log(end(3, lanes=1)._replace(epochs=12))
    assert epochs(path) == [1, 2, 3]


def test_fits_of_other_lengths_may_have_other_keys(path):
    with JsonLines(path) as log:
        log(end(1))
        with pytest.raises(ValueError, match=r"epoch 1 of .* was logged before"):
            log(end(1)._replace(epochs=3))


def test_a_partial_of_arrays_can_be_logged_and_saved(tiny, tmp_path, path):
    config = dataclasses.replace(CONFIG, optimiser=functools.partial(optax.sgd, momentum=np.float32(0.5)))
    with JsonLines(path) as log:
        fit(tiny, tiny, key=jax.random.key(0), config=config, epochs=1, on_epoch=log, checkpoint=tmp_path / "saved")
    (line,) = read(path)
    assert line["config"]["optimiser"]["keywords"] == {"momentum": 0.5}


def test_the_usual_config_is_not_told(path):
    with JsonLines(path) as log:
        log(end(1))
    (line,) = read(path)
    assert "config" not in line


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_stopped_lane_is_null(path, value):
    row = end(1, lanes=2)
    row.history.validation.loss[0, 1] = value
    with JsonLines(path) as log:
        log(row._replace(history=jax.tree.map(lambda leaf: leaf.astype(np.float32), row.history)))
    assert [line["validation_loss"] for line in read(path)] == [0.5, None]


def test_a_line_is_there_at_once(path):
    with JsonLines(path) as log:
        for epoch in (1, 2):
            log(end(epoch))
            assert epochs(path) == list(range(1, epoch + 1))


def test_a_run_that_goes_on_leaves_each_epoch_once(tiny, tmp_path, path):
    """Also of epochs that were logged and not saved; figures are those of an undisturbed run."""
    run = functools.partial(
        sweep, tiny, tiny, seeds=[0, 1], dropout_rates=[0.0, 0.2], config=CONFIG, checkpoint=Checkpoints(tmp_path / "c")
    )
    with JsonLines(path) as log:
        run(epochs=3, on_epoch=log)
        # As if the run had been killed before it saved these.
        for epoch in (4, 5):
            log(end(epoch, config=CONFIG, rates=(0.0, 0.2), lanes=2))
    with JsonLines(path) as log:
        history = run(epochs=6, on_epoch=log).history
    for i, rate in enumerate((0.0, 0.2)):
        for seed in (0, 1):
            of_lane = [line for line in read(path) if (line["dropout_rate"], line["seed"]) == (rate, seed)]
            assert [line["epoch"] for line in of_lane] == [1, 2, 3, 4, 5, 6]
            assert [line["running_loss"] for line in of_lane] == history.running_loss[i, seed].tolist()


@pytest.mark.usefixtures("compiled_apart")
def test_a_kill_before_an_epoch_is_logged_leaves_none_out(tiny, tmp_path, path):
    code = """
import os, signal, sys, time
import jax, numpy as np
from fashion_jax import Batch, TrainConfig, fit
from fashion_jax.log import JsonLines
batch = Batch(*np.load(sys.argv[3]).values())
with JsonLines(sys.argv[1]) as log:
    def report(end):
        if end.epoch == 3 and sys.argv[4] == "killed":
            time.sleep(3)  # longer than a checkpoint takes
            os.kill(os.getpid(), signal.SIGKILL)
        log(end)
    config = TrainConfig(hidden=(16,))
    fit(batch, batch, key=jax.random.key(0), config=config, epochs=4, on_epoch=report, checkpoint=sys.argv[2])
"""
    np.savez(tmp_path / "batch.npz", *tiny)
    found = []
    for what, status in (("killed", -signal.SIGKILL), ("not", 0)):
        arguments = (path, tmp_path / "saved", tmp_path / "batch.npz", what)
        result = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, stderr=subprocess.PIPE)
        assert result.returncode == status, result.stderr
        found.append(epochs(path))
    assert found == [[1, 2], [1, 2, 3, 4]]


def test_a_network_that_is_trained_again_gives_way_and_others_stay(path):
    for entries in ({"run": 1}, {"run": 2}, {"run": 1}, {"run": True}):
        with JsonLines(path, **entries) as log:
            for epoch in (1, 2):
                log(end(epoch))
    with JsonLines(path, run=1) as log:
        log(end(1, rates=(0.5,)))
    assert [(line["run"], line["dropout_rate"], line["epoch"]) for line in read(path)] == [
        *((2, 0.2, 1), (2, 0.2, 2), (1, 0.2, 1), (1, 0.2, 2), (True, 0.2, 1), (True, 0.2, 2), (1, 0.5, 1)),
    ]


def test_one_log_serves_several_runs_that_differ(path):
    with JsonLines(path) as log:
        for rate in (0.0, 0.2):
            for epoch in (1, 2):
                log(end(epoch, rates=(rate,)))
        with pytest.raises(ValueError, match=r"epoch 2 of train_size 50, dropout_rate 0\.2 was logged before.*entries"):
            log(end(2))
    assert [(line["dropout_rate"], line["epoch"]) for line in read(path)] == [(0.0, 1), (0.0, 2), (0.2, 1), (0.2, 2)]


def test_epochs_that_are_missing_are_told(path, caplog):
    with JsonLines(path) as log:
        log(end(1))
    with JsonLines(path) as log, caplog.at_level(logging.WARNING):
        log(end(4))
    assert f"{path} lacks lines of the epochs from 2 to 3 of the network" in caplog.text
    assert epochs(path) == [1, 4]


def test_networks_that_are_behind_the_others_are_told(path, caplog):
    """As after an epoch that was written for some of them."""
    with JsonLines(path) as log:
        log(end(1, lanes=3))
        log(end(2, lanes=3))
    first, *others = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join((first, *others[:3])))
    with JsonLines(path) as log, caplog.at_level(logging.WARNING):
        log(end(3, lanes=3))
    assert f"{path} lacks lines of the epochs from 2 to 2 of 2 of 3 networks" in caplog.text


def test_a_link_stays_one(path):
    path.parent.mkdir()
    link = path.with_name("link")
    link.symlink_to(path)
    for _ in range(2):
        with JsonLines(link) as log:
            log(end(1))
    assert link.is_symlink()
    assert epochs(path) == [1]


def test_an_epoch_that_was_written_in_part_is_whole_after_the_run_went_on(tiny, tmp_path, path):
    """As on a disk that was full for a moment."""

    class Full(JsonLines):
        def _write(self, line):
            if '"epoch": 2, "train_size": 50' in line and '"seed": 1' in line:
                raise OSError(errno.ENOSPC, "No space left on device")
            super()._write(line)

    run = functools.partial(
        sweep, tiny, tiny, seeds=[0, 1, 2], dropout_rates=[0.0], config=CONFIG, epochs=3, checkpoint=tmp_path / "saved"
    )
    with Full(path) as log, pytest.raises(OSError, match="No space left"):
        run(on_epoch=log)
    with JsonLines(path) as log:
        run(on_epoch=log)
    for seed in (0, 1, 2):
        assert epochs(path, seed=seed) == [1, 2, 3]


def test_a_kill_at_any_moment_leaves_whole_lines_and_each_epoch_once(path):
    code = """
import sys
sys.path[:0] = sys.argv[2:]
from test_log import JsonLines, end
with JsonLines(sys.argv[1]) as log:
    print("ready", flush=True)
    for epoch in range(1, 100_000):
        log(end(epoch, lanes=20))
"""
    places = [str(ROOT), str(ROOT / "tests")]
    command = [sys.executable, "-c", code, str(path), *places]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        while not path.stat().st_size:
            pass
        process.send_signal(signal.SIGKILL)
    found = read(path)
    assert found
    assert [line["seed"] for line in found] == [i % 20 for i in range(len(found))]
    last = found[-1]["epoch"]
    with JsonLines(path) as log:
        log(end(last, lanes=20))
    for seed in range(20):
        assert epochs(path, seed=seed) == list(range(1, last + 1))


def test_a_line_that_lacks_its_end_alone_stays(path):
    """As some editors leave it."""
    with JsonLines(path) as log:
        log(end(1))
        log(end(2))
    whole = path.read_bytes()
    path.write_bytes(whole.removesuffix(b"\n"))
    with JsonLines(path):
        assert path.read_bytes() == whole


@pytest.mark.parametrize("cut", [1, 5, 11, 12, 50, -2])
def test_a_half_line_is_removed(path, cut):
    with JsonLines(path) as log:
        log(end(1))
        log(end(2))
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:cut])
    with JsonLines(path) as log:
        assert path.read_bytes() == first
        log(end(2))
    assert path.read_bytes() == first + second


LINE = json.dumps({"epoch": 1, "dropout_rate": 0.2, **dict.fromkeys(FIGURES, 0.5)}).encode() + b"\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# Notes\n", "line 1: not a line of such a log"),
        (b"my notes", "not a log of JSON lines"),
        (LINE + b"\n", "line 2: not a line"),
        (LINE + b'{"epoch": 2, "drop\n', "line 2: not a line"),
        (b'{"epoch": 12, "best_accuracy": 0.9132}', "not a log of JSON lines"),
        (b'{"epoch": 12, "best_accuracy": 0.9132}\n', "line 1: not a line"),
        (b'{"epoch": "one"}\n', "line 1: not a line"),
        (b"[1, 2]\n", "line 1: not a line"),
        (b"\x89PNG\r\n", "line 1: not a line"),
    ],
)
def test_other_files_stay_as_they_are(tmp_path, content, message):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        JsonLines(path)
    assert path.read_bytes() == content


def test_places_that_hold_no_log_are_named(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"this is a directory; name a file to log into: '{tmp_path}'"):
        JsonLines(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="no regular file; name a file to log into"):
        JsonLines(tmp_path / "fifo")
    (tmp_path / "file").touch()
    with pytest.raises((FileExistsError, NotADirectoryError), match=r"no log can be written here: '.*file/log'"):
        JsonLines(tmp_path / "file" / "log")
    with pytest.raises(OSError, match=r"no log can be written here: '/proc/log.jsonl'"):
        JsonLines("/proc/log.jsonl")


def test_a_second_writer_is_refused(path):
    with JsonLines(path) as log:
        log(end(1))
        with pytest.raises(BlockingIOError, match=f"another process is writing into this log.*{path}"):
            JsonLines(path)
        log(end(2))
    with JsonLines(path) as log:
        log(end(1))
        with pytest.raises(BlockingIOError, match="another process"):
            JsonLines(path)
    assert epochs(path) == [1]


def test_a_file_system_without_locks_lets_everybody_in(path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with JsonLines(path) as log:
        log(end(1))
    assert epochs(path) == [1]


def test_a_full_disk_leaves_whole_lines(path):
    code = """
import resource, sys
sys.path[:0] = sys.argv[2:]
from test_log import JsonLines, end
resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
with JsonLines(sys.argv[1]) as log:
    for epoch in range(1, 10):
        try:
            log(end(epoch))
        except OSError as error:
            print(error)
"""
    command = [sys.executable, "-c", code, str(path), str(ROOT), str(ROOT / "tests")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"File too large; the log ends before this line: '{path}'" in result.stdout
    assert epochs(path) == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epoch": 3}, ValueError, "epoch is written into each line already; give this entry another name"),
        ({"config": "wide"}, ValueError, "config is written into each line already"),
        ({"train_loss": 3}, ValueError, "train_loss is written into each line already"),
        ({"lr": float("nan")}, ValueError, "lr must be finite, got nan"),
        ({"lr": [1]}, TypeError, r"lr must be text, a number, True, False or None, got \[1\]"),
        ({"lr": np.float32(1)}, TypeError, "lr must be text, a number"),
    ],
)
def test_bad_arguments_are_named(path, unchecked, options, error, message):
    with pytest.raises(error, match=message):
        JsonLines(path, **options)
    assert not path.exists()


def test_a_sweep_tells_its_seeds_itself(path):
    with JsonLines(path, seed=3) as log, pytest.raises(ValueError, match="seed is told by the sweep"):
        log(end(1, lanes=2))
    with pytest.raises(ValueError, match=f"{path}: this log is closed"):
        log(end(1, lanes=1))
    assert not read(path)


def test_progress_is_a_bar_in_a_notebook(small, tmp_path):
    np.savez(tmp_path / "small.npz", *small)
    source = f"""
import jax, numpy as np
from fashion_jax import Batch, fit
from fashion_jax.log import Progress
train = Batch(*np.load({str(tmp_path / "small.npz")!r}).values())
with Progress(epochs=1) as progress:
    run = fit(train, train, key=jax.random.key(0), epochs=1, on_epoch=progress)
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    shown = "".join(output.get("text", "") + str(output.get("data", "")) for output in notebook.cells[0].outputs)
    assert "1/1" in shown
    assert "accuracy=" in shown
