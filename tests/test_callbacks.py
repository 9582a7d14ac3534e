"""Progress on the screen, epochs as JSON lines, early stopping."""

import io
import itertools
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType, SimpleNamespace

import jax
import numpy as np
import pytest

from fashion_jax import Batch, FashionMLP, TrainConfig, fit, sweep
from fashion_jax.callbacks import EarlyStopping, EpochEnd, JsonLines, Progress, read_json_lines, shown
from fashion_jax.types import History, Metrics

CONFIG = TrainConfig(model=FashionMLP(hidden=(8,)))
TWO = {"dropout_rate": (0.0, 0.2), "seed": (0, 1)}
nan = np.nan


def end(epoch, loss=0.5, axes=MappingProxyType({}), epochs=3) -> EpochEnd:
    if np.ndim(loss) <= len(axes):
        loss = np.broadcast_to(np.float64(loss), tuple(map(len, axes.values())))[..., None]
    history = History(loss, Metrics(2 * loss, loss), Metrics(loss, loss / 2))
    return EpochEnd(epoch, epochs, axes, {"b1": 0.9}, history, dict)


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Broken(io.StringIO):
    """A pipe whose reader has gone."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


@pytest.mark.parametrize(
    ("axes", "loss", "settings", "shown"),
    [
        ({}, 0.5, "", "{0.5}"),
        ({"seed": (0, 1)}, [1, 3], "", "{2}"),
        (TWO, [[1, 2], [nan, 5]], ", dropout_rate 0 | 0.2", "{1.5} | {5}"),
        ({"a": (0, 1), "b": (2, 3)}, [[1, 2], [nan, 5]], ", a/b 0/2 | 0/3 | 1/2 | 1/3", "{1} | {2} | {nan} | {5}"),
        ({"rate": (0.0, 0.1, 0.2, 0.3, 0.4)}, [2, 1, nan, 4, 3], ", 5 settings", "{1} to {4}"),
    ],
)
def test_a_line_shows_means_over_seeds_for_each_setting(axes, loss, settings, shown):
    file = io.StringIO()
    Progress(file)(end(2, loss, axes))
    training, validation, accuracy = (
        re.sub(r"{(.*?)}", lambda found, factor=factor: f"{factor * float(found[1]):.4f}", shown)
        for factor in (2, 1, 0.5)
    )
    expected = f"training loss {training}, validation loss {validation}, accuracy {accuracy}"
    assert file.getvalue() == f"epoch 2/3{settings}: {expected}\n"


@pytest.mark.parametrize("notebook", [False, True])
def test_each_run_has_one_bar_that_starts_where_the_run_does(monkeypatch, notebook):
    if notebook:
        shell = SimpleNamespace(config={"IPKernelApp": {}})
        monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    file = io.StringIO() if notebook else Terminal()
    progress = Progress(file)
    # The second run resumes after its third epoch.
    for epoch, epochs in ((1, 3), (2, 3), (3, 3), (4, 6), (5, 6), (6, 6), (1, 9)):
        progress(end(epoch, [[1, 1], [3, 3]], TWO, epochs))
    bars = file.getvalue().split("\n")
    found = [re.findall(r"(\d/\d) \[", bar) for bar in bars]
    assert [(bar[0], bar[-1]) for bar in found] == [("1/3", "3/3"), ("4/6", "6/6"), ("1/9", "1/9")]
    assert re.search(r"dropout_rate 0 \| 0\.2: .*validation loss 1\.0000 \| 3\.0000, accuracy", bars[0])


@pytest.mark.parametrize(
    ("progress", "terminal", "callbacks", "bars"),
    [(None, False, 0, 0), (None, True, 0, 1), (False, True, 0, 0), (True, False, 0, 1), (True, True, 1, 1)],
)
def test_progress_is_shown_once_where_somebody_watches(small, monkeypatch, progress, terminal, callbacks, bars):
    tiny, file = Batch(*(leaf[:100] for leaf in small)), Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    how = {"config": CONFIG, "epochs": 2, "progress": progress, "callbacks": [Progress()] * callbacks}
    fit(tiny, tiny, key=jax.random.key(0), **how)
    sweep(tiny, tiny, seeds=(0, 1), **how)
    assert len(re.findall(r"2/2.*validation loss", file.getvalue())) == 2 * bars


@pytest.mark.parametrize(
    ("kind", "bars"),
    [(io.StringIO, 0), (Terminal, 0), (Broken, 0), (type("BrokenTerminal", (Broken, Terminal), {}), 1), (None, 0)],
)
def test_a_run_outlives_whoever_reads_its_progress(kind, bars, monkeypatch):
    file = kind() if kind else None
    monkeypatch.setattr(sys, "stderr", file)
    if kind in (io.StringIO, Terminal):
        file.close()
    assert len(shown([], None)) == bars
    for progress, epoch in itertools.product((Progress(), Progress(file)), (1, 2, 3)):
        assert progress(end(epoch)) is None


def test_lines_hold_the_metrics_of_the_history(small, tmp_path):
    tiny, path = Batch(*(leaf[:100] for leaf in small)), tmp_path / "größe 1" / "log.jsonl"
    log = JsonLines(path, note="größe\u2028", size=100)
    result = sweep(tiny, tiny, seeds=(3, 5), dropout_rate=(0.0, 0.5), config=CONFIG, epochs=2, callbacks=[log])
    rows = read_json_lines(path)
    assert len(path.read_text().splitlines()) == 8
    about = {"note": "größe\u2028", "size": 100, "learning_rate": 0.003, "dropout_rate": 0.0, "seed": 3, "epoch": 1}
    curves = result.history.curves()
    assert rows[0] == about | {name: curve[0, 0, 0] for name, curve in curves.items()}
    for i, j in np.ndindex(2, 2):
        lane = {"dropout_rate": (0.0, 0.5)[i], "seed": (3, 5)[j]}
        found = [row for row in rows if lane.items() <= row.items()]
        assert [row["epoch"] for row in found] == [1, 2]
        assert all([row[name] for row in found] == curve[i, j].tolist() for name, curve in curves.items())


def test_a_resumed_run_leaves_each_epoch_once_and_one_that_diverged_is_null(tmp_path):
    path = tmp_path / "log"
    for run, epochs, loss in (("a", (1, 2, 3), 1), ("a", (3, 4), 2), ("b", (1,), nan)):
        log = JsonLines(path, run=run)
        for epoch in epochs:
            log(end(epoch, loss, {"seed": (0, 1)}))
    rows = read_json_lines(path)
    assert (len(rows), len(path.read_text().splitlines())) == (10, 12)
    for seed in (0, 1):
        losses = {(row["run"], row["epoch"]): row["running_loss"] for row in rows if row["seed"] == seed}
        assert losses == {("a", 1): 1, ("a", 2): 1, ("a", 3): 2, ("a", 4): 2, ("b", 1): None}


def test_half_a_line_costs_itself_alone(tmp_path):
    path = tmp_path / "log"
    for epoch in (1, 2):
        JsonLines(path)(end(epoch))
    content = path.read_bytes()
    for cut in range(content.index(b"\n") + 1, len(content) + 1):
        path.write_bytes(content[:cut])
        left = [1, 2] if cut >= len(content) - 1 else [1]  # The line may lack its line feed.
        assert [row["epoch"] for row in read_json_lines(path)] == left
        JsonLines(path)(end(3))
        assert [row["epoch"] for row in read_json_lines(path)] == [*left, 3]


def test_several_runs_may_write_into_one_file(tmp_path):
    def write(epoch):
        JsonLines(tmp_path / "log")(end(epoch, axes={"seed": tuple(range(30))}))

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(300)))
    assert len(read_json_lines(tmp_path / "log")) == 9_000


def test_a_log_that_cannot_be_written_is_an_error_before_training(tmp_path, monkeypatch, unchecked):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "log", tmp_path):
        with pytest.raises(OSError, match=path.name):
            JsonLines(path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        JsonLines(tmp_path / "log", note={1, 2})
    monkeypatch.setenv("HOME", str(tmp_path))
    JsonLines("~/new/log")(end(1))
    assert read_json_lines("~/new/log") == read_json_lines(tmp_path / "new" / "log")


@pytest.mark.parametrize(
    ("options", "losses", "last"),
    [
        ({"patience": 2}, [3, 2, 2, 2, 1], 4),
        ({"patience": 2}, [3, 2, 2.5, 1, 1, 2, 0], 6),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.75, 2.25, 2, 2, 0], 5),
        ({}, [1, 2, 3, 4, 5, 6, 0], 6),
        ({"patience": 3}, [4, 3, 2, 1], None),
        # A sweep ends when no run improves anymore.
        ({"patience": 2}, [[3, 3, nan], [2, 3, nan], [3, 2, nan], [2, 2, nan], [2.5, 2, nan], [1, 1, nan]], 5),
    ],
)
def test_early_stopping_waits_for_an_improvement(options, losses, last):
    stop, axes = EarlyStopping(**options), {"seed": (0, 1, 2)} if np.ndim(losses) == 2 else {}
    # The second run is judged by itself, and the third one resumes.
    for first in (1, 1, 3):
        epochs = range(first, len(losses) + 1)
        stops = [stop(end(epoch, np.moveaxis(np.float64(losses[:epoch]), 0, -1), axes)) for epoch in epochs]
        assert next((epoch for epoch, stopped in zip(epochs, stops, strict=True) if stopped), None) == last
    with pytest.raises(ValueError, match="patience must be at least 1, got 0"):
        EarlyStopping(patience=0)
