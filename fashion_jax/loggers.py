"""Loggers for `fit` and `sweep`: callbacks that log to TensorBoard, Weights & Biases and MLflow, one run per lane.

A resumed run continues its log, and each epoch is logged once. With several processes, only the first one logs. The
extras `tensorboard`, `wandb` and `mlflow` install what each needs; without it, a new logger raises ImportError.

>>> import tempfile, numpy as np
>>> from fashion_jax import Batch, sweep
>>> data, place = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100) % 10), tempfile.mkdtemp()
>>> result = sweep(data, data, seeds=(3, 5), dropout_rate=(0.2,), epochs=2, callbacks=[TensorBoard(place)])
>>> sorted(os.listdir(place))
['dropout_rate=0.2,seed=3', 'dropout_rate=0.2,seed=5']
"""

import contextlib
import hashlib
import importlib
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fashion_jax import _checks
from fashion_jax.callbacks import EpochEnd


class _Lane(NamedTuple):
    """One run to log. Its id is that of the hyperparameters and the first epoch: a resumed run has the same one."""

    name: str
    id: str
    hyperparameters: dict[str, Any]
    curves: list[str]
    epoch: int


class _Logger:
    """Opens a run for each lane when a run starts or resumes, and closes them after the last epoch."""

    def __init__(self, package: str, extra: str, entries: Mapping[str, Any]):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f'this logger needs {package}: pip install "fashion_jax[{extra}]"') from error
        self._entries, self._lanes, self._next, self._opened = entries, [], 1, contextlib.ExitStack()
        # A run that ends early is closed with the last reference to its logger, or at exit.
        weakref.finalize(self, self._opened.close)

    def _open(self, lane: _Lane, opened: contextlib.ExitStack) -> tuple[int, Callable[[dict[str, float], int], Any]]:
        """Return the last epoch that the run has logged, and a function that logs another one."""
        raise NotImplementedError

    def __call__(self, end: EpochEnd) -> None:
        """Log one epoch."""
        if jax.process_index() > 0:
            return
        names = list(end.history.curves())
        if end.epoch == 1 or end.epoch != self._next:
            self._opened.close()
            self._lanes = [self._open(lane, self._opened) for lane in self._described(end, names)]
        for (last, log), row in zip(self._lanes, end.rows(), strict=True):
            if end.epoch > last:
                log({name: row[name] for name in names}, end.epoch)
        self._next = end.epoch + 1
        if end.epoch == end.epochs:
            self._opened.close()

    def _described(self, end: EpochEnd, names: list[str]) -> Iterator[_Lane]:
        first = end._replace(epoch=1, history=jax.tree.map(lambda curve: curve[..., :1], end.history))
        for row in first.rows():
            row = {**self._entries, **row}
            parts = [f"{name}={row[name]}" for name in (*self._entries, *end.axes)]
            identity = hashlib.sha256(json.dumps(row, default=str).encode()).hexdigest()[:16]
            numbers = {name: value for name, value in row.items() if name not in ("epoch", *names)}
            yield _Lane(",".join(parts) or "run", identity, numbers, names, end.epoch)


class TensorBoard(_Logger):
    """Log to TensorBoard: scalars and hyperparameters, in a directory for each run.

    Args:
        directory: Where to write; a run that starts again there replaces the one before.
        **entries: Further entries that identify the run, such as the seed of a `fit`.
    """

    def __init__(self, directory: str | os.PathLike[str], **entries: Any):
        super().__init__("tensorboardX", "tensorboard", entries)
        self._directory = _checks.path("directory", directory)

    def _open(self, lane, opened):
        from tensorboardX import summary

        write = _event_file(self._directory / lane.name, lane.epoch, opened)
        for table in summary.hparams(lane.hyperparameters, dict.fromkeys(lane.curves)):
            write(0, summary=table)

        def log(metrics, epoch):
            values = [summary.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
            write(epoch, summary=summary.Summary(value=values))

        return 0, log


class WandB(_Logger):
    """Log to Weights & Biases: metrics by epoch, and hyperparameters as config.

    Args:
        **options: Arguments of `wandb.init`, such as project, group and mode. Entries of config identify the run.
    """

    def __init__(self, **options: Any):
        super().__init__("wandb", "wandb", options.pop("config", {}))
        self._options: dict[str, Any] = options
        if "dir" in options:
            self._options["dir"] = _checks.path("dir", options["dir"])

    def _open(self, lane, opened):
        import wandb

        how = {"id": lane.id, "resume": "allow", "reinit": "create_new", "name": lane.name}
        run = wandb.init(**how, config=lane.hyperparameters, **self._options)
        opened.callback(run.finish)
        return run.step - 1, lambda metrics, epoch: run.log(metrics, step=epoch, commit=True)


class MLflow(_Logger):
    """Log to MLflow: metrics by epoch, and hyperparameters as parameters.

    Args:
        experiment: Name of the experiment; made if missing.
        tracking_uri: A server, or a file such as "sqlite:///mlflow.db"; by default MLflow's own.
        **entries: Further entries that identify the run, such as the seed of a `fit`.
    """

    def __init__(self, experiment: str, tracking_uri: str | None = None, **entries: Any):
        super().__init__("mlflow", "mlflow", entries)
        self._experiment, self._uri = experiment, tracking_uri

    def _open(self, lane, opened):
        from mlflow import MlflowClient, entities

        client = MlflowClient(self._uri)
        found = client.get_experiment_by_name(self._experiment)
        place = found.experiment_id if found else client.create_experiment(self._experiment)
        runs = client.search_runs([place], f"tags.fashion_jax = '{lane.id}'", max_results=1)
        number = (runs or [client.create_run(place, tags={"fashion_jax": lane.id}, run_name=lane.name)])[0].info.run_id
        client.log_batch(number, params=[entities.Param(name, str(v)) for name, v in lane.hyperparameters.items()])
        opened.callback(client.set_terminated, number)

        def log(metrics, epoch):
            now = int(1000 * time.time())
            client.log_batch(number, [entities.Metric(name, value, now, epoch) for name, value in metrics.items()])

        return max((metric.step for metric in client.get_metric_history(number, lane.curves[0])), default=0), log


def _event_file(directory: Path, epoch: int, opened: contextlib.ExitStack) -> Callable[..., None]:
    """Open a file of TensorBoard events, and return its writer; the file replaces earlier events from the epoch on."""
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

    directory.mkdir(parents=True, exist_ok=True)
    # The rest of the name is the time in seconds. SummaryWriter would lose what is queued when the process is killed.
    writer = EventsWriter(str(directory / "events"), f".{epoch:05}")
    opened.callback(writer.close)

    def write(step: int, **content: Any) -> None:
        writer.write_event(Event(wall_time=time.time(), step=step, **content))
        writer.flush()

    write(epoch, session_log=SessionLog(status=SessionLog.START))
    return write
