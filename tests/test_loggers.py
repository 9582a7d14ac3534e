"""TensorBoard, Weights & Biases and MLflow hold the numbers of the history, each epoch once, after a resume too."""

import contextlib
import itertools
import json
import sqlite3
import struct
import sys
from collections import defaultdict

import jax
import numpy as np
import pytest

from fashion_jax import Batch, Checkpoints, EarlyStopping, FashionMLP, TrainConfig, fit, sweep
from fashion_jax.loggers import MLflow, TensorBoard, WandB

CONFIG = TrainConfig(model=FashionMLP(hidden=(8,)))


@pytest.fixture(autouse=True)
def at_home(monkeypatch, tmp_path):
    """Nothing is written outside the test's directory."""
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def tensorboard_records(path):
    """Yield the records of a TFRecord file: length, checksum, content, checksum."""
    content, at = path.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield content[at + 12 : at + 12 + length]
        at += length + 16


def read_tensorboard(place):
    """Apply the events as TensorBoard does: a session that starts at an epoch removes it and all later ones."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    for run in place.glob("size=*"):
        curves, numbers, shown = defaultdict(dict), {}, set()
        for event in (Event.FromString(data) for file in sorted(run.iterdir()) for data in tensorboard_records(file)):
            if event.HasField("session_log"):
                for name, curve in curves.items():
                    curves[name] = {epoch: value for epoch, value in curve.items() if epoch < event.step}
            for value in event.summary.value:
                hparams = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                numbers |= {name: v.number_value for name, v in hparams.session_start_info.hparams.items()}
                shown |= {metric.name.tag for metric in hparams.experiment.metric_infos}
                if not value.HasField("metadata"):
                    assert event.step not in curves[value.tag]
                    curves[value.tag][event.step] = value.simple_value
        assert shown == set(curves)
        yield run.name, numbers, curves


def wandb_records(path):
    """Yield the records of a log in LevelDB's format: pieces that no block of 32 KiB cuts."""
    content, at, record = path.read_bytes(), 7, b""
    while at < len(content):
        if (left := -at % 2**15) < 7:
            at += left
        _, length, kind = struct.unpack_from("<IHB", content, at)
        record += content[at + 7 : at + 7 + length]
        at += length + 7
        if kind in (1, 4):  # A whole record, or its last piece.
            yield record
            record = b""


def read_wandb(place):
    """Join the files of each run; those of a resumed run tell the same about the epochs that they share."""
    from wandb.proto.wandb_internal_pb2 import Record

    runs = {}
    for file in sorted(place.glob("wandb/offline-run-*/*.wandb")):
        seen, curves = [], {}
        for record in map(Record.FromString, wandb_records(file)):
            if record.HasField("run"):
                items = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                about = [record.run.display_name, {key: items[key] for key in items if key != "_wandb"}]
                *first, curves = runs.setdefault(record.run.run_id, (*about, defaultdict(dict)))
                assert (first, record.run.project) == (about, "dropout")
            if record.HasField("history"):
                seen.append(epoch := record.history.step.num)
                for item in record.history.item:
                    (name,), value = item.nested_key or [item.key], json.loads(item.value_json)
                    if not name.startswith("_"):
                        np.testing.assert_array_equal(curves[name].setdefault(epoch, value), value)
        assert len(set(seen)) == len(seen)
    return runs.values()


def read_mlflow(place):
    with contextlib.closing(sqlite3.connect(place / "mlflow.db")) as database:
        for run, name, status in database.execute("SELECT run_uuid, name, status FROM runs").fetchall():
            assert status == "FINISHED"
            numbers = database.execute("SELECT key, value FROM params WHERE run_uuid = ?", [run])
            metrics = database.execute("SELECT key, step, value, is_nan FROM metrics WHERE run_uuid = ?", [run])
            curves = defaultdict(dict)
            for key, epoch, value, is_nan in metrics:
                assert epoch not in curves[key]
                curves[key][epoch] = np.nan if is_nan else value
            yield name, {key: json.loads(value) for key, value in numbers}, curves


LOGGERS = {
    "tensorboard": (lambda place: TensorBoard(place, size=100), read_tensorboard),
    "wandb": (lambda place: WandB(project="dropout", dir=place, config={"size": 100}), read_wandb),
    "mlflow": (lambda place: MLflow("dropout", f"sqlite:///{place}/mlflow.db", size=100), read_mlflow),
}


def logged(run):
    return {name: dict(enumerate(curve.tolist(), start=1)) for name, curve in run.history.curves().items()}


@pytest.mark.parametrize("kind", LOGGERS)
def test_a_killed_and_resumed_sweep_is_logged_once(kind, small, tmp_path):
    make, read = LOGGERS[kind]
    tiny, place = Batch(*(leaf[:100] for leaf in small)), tmp_path / "logs"
    place.mkdir()
    # With the second learning rate every run diverges.
    lanes = {"learning_rate": (0.003, 1e30), "seeds": (3, 5), "epochs": 4, "config": CONFIG}
    saved = Checkpoints(tmp_path / "saved", every=2)

    def die(end):
        if end.epoch == 3:
            raise KeyError

    with pytest.warns(UserWarning, match="2 of 4 runs diverged"), pytest.raises(KeyError):
        sweep(tiny, tiny, **lanes, checkpoint=saved, callbacks=[make(place), die])
    result = sweep(tiny, tiny, **lanes, checkpoint=saved, callbacks=[make(place)])
    found = {name: rest for name, *rest in read(place)}
    assert len(found) == 4
    for rate, seed in itertools.product((0.003, 1e30), (3, 5)):
        numbers, curves = found[f"size=100,learning_rate={rate},seed={seed}"]
        assert numbers == {"size": 100, "dropout_rate": 0.0, "learning_rate": rate, "seed": seed}
        np.testing.assert_equal(dict(curves), logged(result.at(learning_rate=rate, seed=seed)))


@pytest.mark.filterwarnings("ignore:the losses have not changed")
@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_one_logger_serves_a_run_that_is_stopped_and_goes_on(kind, small, tmp_path):
    make, read = LOGGERS[kind]
    tiny, log, stop = Batch(*(leaf[:100] for leaf in small)), make(tmp_path), EarlyStopping(patience=1)
    how = {"key": jax.random.key(0), "config": CONFIG, "learning_rate": 0.0, "checkpoint": tmp_path / "saved" / "run"}
    for epochs, callbacks in ((1, [log]), (5, [log, stop]), (4, [log])):
        run = fit(tiny, tiny, **how, epochs=epochs, callbacks=callbacks)
    del log
    (curves,) = [curves for name, _, curves in read(tmp_path) if name == "size=100"]
    assert curves == logged(run)


@pytest.mark.parametrize(("kind", "package"), [("tensorboard", "tensorboardX"), ("wandb",) * 2, ("mlflow",) * 2])
def test_a_missing_package_is_an_error_before_training(kind, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf'needs {package}: pip install "fashion_jax\[{kind}\]"'):
        LOGGERS[kind][0](tmp_path)
