"""Checkpoints: one safetensors file per epoch, written in the background, verified on every read.

A directory belongs to one run, whose identity is in every file: keys, hyperparameters, data, and the digest of the
epoch's lowered program, which covers model, optimizer, loss and sizes::

    DIR/lock                        held by the run that writes here
    DIR/epoch-00012.safetensors     state, best parameters and history after epoch 12
"""

import dataclasses
import functools
import json
import logging
import os
import re
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fashion_jax import _checks, files
from fashion_jax.config import TrainConfig

logger: logging.Logger = logging.getLogger(__name__)


class Checkpoints(NamedTuple):
    """Directory and frequency of saving; `fit` and `sweep` take one of these, or just the directory.

    Attributes:
        directory: A directory for this run alone; made if missing.
        every: Epochs between two checkpoints. The last epoch is always saved.
        keep: Number of newest checkpoints to keep, beside that of the best epoch.
    """

    directory: str | os.PathLike[str]
    every: int = 1
    keep: int = 2


class NoStore:
    """Stands in for a `Store` where nothing is saved."""

    advice = "with checkpoint=DIRECTORY the same call would resume from there"

    def __enter__(self) -> "NoStore":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def restore(self, like: Any) -> tuple[int, Any]:
        """Find nothing to resume from."""
        return 0, like

    def save(self, epoch: int, tree: Callable[[], Any], *, best: int, last: bool = False) -> None:
        """Save nothing."""


class Store:
    """A directory that one run saves to, locked while the run is alive.

    Args:
        checkpoint: The directory, or `Checkpoints`.
        identity: Everything that determines the run, as JSON values.
        hints: Text that explains a difference in `identity["program"]`.
        writes: Whether this process writes; one of several does.

    Raises:
        OSError: On entering: the directory cannot be written, or another run is using it.

    >>> import tempfile
    >>> tree = {"weights": np.ones(3)}
    >>> with Store(tempfile.mkdtemp(), identity={"seed": 0}) as store:
    ...     store.save(1, lambda: tree, best=1, last=True)
    ...     epoch, restored = store.restore(tree)
    >>> epoch, restored["weights"].tolist()
    (1, [1.0, 1.0, 1.0])
    """

    def __init__(
        self,
        checkpoint: Checkpoints | str | os.PathLike[str],
        *,
        identity: Mapping[str, Any],
        hints: Mapping[str, str] | None = None,
        writes: bool = True,
    ):
        import filelock

        place = checkpoint if isinstance(checkpoint, Checkpoints) else Checkpoints(checkpoint)
        self.directory: Path = _checks.path("checkpoint", place.directory).absolute()
        self._every = _checks.integer("checkpoint.every", place.every, 1)
        self._keep = _checks.integer("checkpoint.keep", place.keep, 1)
        self.advice: str = f"the same call resumes from {self.directory}"
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._hints = dict(hints or {})
        self._circumstances = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        self._writes = writes
        self._saved = 0
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._lock = filelock.FileLock(self.directory / "lock")

    def __enter__(self) -> "Store":
        import filelock

        if self._writes:
            self.directory.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=0)
            except filelock.Timeout:
                raise BlockingIOError(
                    f"another run is saving to {self.directory}; wait for it, or name another directory"
                ) from None
            except BaseException:  # Ctrl-C: a notebook keeps the traceback, and with it this object.
                self._lock.release()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._wait()
        finally:
            self._lock.release()

    def restore(self, like: Any) -> tuple[int, Any]:
        """Return the newest good checkpoint of this run: its epoch, and its tree as NumPy arrays.

        A damaged one is passed over with a warning. Files that a killed writer left behind are removed.

        Args:
            like: A tree with the structure that was saved.

        Returns:
            (0, like) if there is no checkpoint.

        Raises:
            DamagedError: All checkpoints are damaged.
            ValueError: They are those of another run.
        """
        self._wait()
        if self._writes:
            for partial in self.directory.glob(".*.partial"):
                partial.unlink(missing_ok=True)
        damaged = []
        for epoch, path in sorted(self._files().items(), reverse=True):
            try:
                tensors, metadata = files.load_tensors(path)
                if json.loads(metadata["epoch"]) != epoch:
                    raise ValueError(f"{path} holds epoch {metadata['epoch']}")
            except ValueError as error:  # One bit makes of the digest's name another name.
                damaged.append(path)
                warnings.warn(f"{error}; falling back to the previous checkpoint, if there is one", stacklevel=2)
                continue
            self._check_same_run(metadata)
            self._saved = epoch
            names = _names(like)
            if sorted(names) != sorted(tensors):
                raise ValueError(f"{path} holds other arrays than this run: {sorted(set(names) ^ set(tensors))}")
            return epoch, jax.tree.unflatten(jax.tree.structure(like), [tensors[name] for name in names])
        if damaged:
            raise files.DamagedError(f"every checkpoint in {self.directory} is damaged; remove it to start over")
        return 0, like

    def save(self, epoch: int, tree: Callable[[], Any], *, best: int, last: bool = False) -> None:
        """Save a tree of NumPy arrays in the background, if this epoch is due and not saved yet.

        Args:
            epoch: Number of the epoch.
            tree: Returns what to save; with several processes every one has to call it.
            best: Number of the best epoch, whose checkpoint is kept.
            last: Save in any case, and wait until it is written.

        Raises:
            OSError: This checkpoint or the one before could not be written; those on disk are intact.
        """
        if epoch > self._saved and (last or epoch % self._every == 0):
            self._wait()
            content = tree()
            if self._writes:
                self._start_writing(epoch, content, best)
            # Last, so that after a Ctrl-C on the way the epoch is saved again.
            self._saved = epoch
        if last:
            self._wait()

    def _start_writing(self, epoch: int, tree: Any, best: int) -> None:
        thread = threading.Thread(target=self._write, args=(epoch, tree, best), name="checkpoint")
        try:
            thread.start()
            self._thread = thread
        except RuntimeError:  # The interpreter is shutting down.
            self._write(epoch, tree, best)

    def _write(self, epoch: int, tree: Any, best: int) -> None:
        metadata = {
            "epoch": epoch,
            "identity": self._identity,
            "hints": self._hints,
            "circumstances": self._circumstances,
        }
        try:
            files.save_tensors(
                self.directory / f"epoch-{epoch:05}.safetensors",
                _named(tree),
                {name: json.dumps(value) for name, value in metadata.items()},
            )
            stored = self._files()
            # Damaged ones may be of later epochs.
            newest = sorted(other for other in stored if other <= epoch)[-self._keep :]
            for other in set(stored) - {*newest, best}:
                stored[other].unlink(missing_ok=True)
        except Exception as error:  # The thread that trains raises it.
            self._error = error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error

    def _files(self) -> dict[int, Path]:
        found = (
            (re.fullmatch(r"epoch-(\d+)\.safetensors", path.name), path) for path in self.directory.glob("epoch-*")
        )
        return {int(match[1]): path for match, path in found if match}

    def _check_same_run(self, metadata: Mapping[str, str]) -> None:
        then, hints, circumstances = (json.loads(metadata[name]) for name in ("identity", "hints", "circumstances"))
        for name, was in circumstances.items():
            if was != self._circumstances[name]:
                now = self._circumstances[name]
                logger.info("%s was %s and is %s: resuming within rounding, not bit by bit", name, was, now)
        pairs = {name: (then.get(name), self._identity.get(name)) for name in {**then, **self._identity}}
        described = {name: (hints.get(name), now) for name, now in self._hints.items()}
        other_version = circumstances["jax"] != self._circumstances["jax"]
        if other_version or then.get("program") != self._identity.get("program"):
            pairs |= described
        # Another version lowers the same program to other text, and a description says more than a digest.
        if other_version or any(was != now for was, now in described.values()):
            pairs.pop("program", None)
        differing = [f"{name} is {was} there and {now} here" for name, (was, now) in pairs.items() if was != now]
        if differing:
            raise ValueError(
                f"{self.directory} holds the checkpoints of another run: {'; '.join(differing)}. "
                "Name another directory, or remove this one"
            )


def identify(lanes: Sequence[Any], axes: Mapping[str, Any], data: Any, start: Any, *, program: str) -> dict[str, Any]:
    """Return everything that determines a run, as JSON values.

    Args:
        lanes: Key and hyperparameters of each run.
        axes: Name and values of each axis.
        data: Training and validation examples.
        start: The state to start from, or None.
        program: Digest of the epoch's program.
    """
    return {name: _checks.as_computed(value) for name, value in (lanes[0][1] | axes).items()} | {
        "key": [np.asarray(jax.random.key_data(key)).tolist() for key, _ in lanes],
        "data": files.digest(_named(data)),
        "start state": start and files.digest(_named(start)),
        "program": program,
    }


def describe(config: TrainConfig) -> dict[str, str]:
    """Return the fields that determine a run as text, functions by their names.

    >>> describe(TrainConfig(batch_size=32))["optimizer"], describe(TrainConfig(batch_size=32))["batch_size"]
    ('optax._src.alias.adam', '32')
    """
    names = [field.name for field in dataclasses.fields(config) if field.name != "eval_batch_size"]
    return {name: _text(getattr(config, name)) for name in names}


def _text(value: Any) -> str:
    if isinstance(value, functools.partial):
        arguments = [*map(_text, value.args), *(f"{name}={_text(entry)}" for name, entry in value.keywords.items())]
        return f"{_text(value.func)}({', '.join(arguments)})"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    # Flax lays a module out over several lines, with a heading.
    return " ".join(line.split("#")[0].strip() for line in repr(value).splitlines()).strip()


def _named(tree: Any) -> dict[str, np.ndarray]:
    return dict(zip(_names(tree), map(np.asarray, jax.tree.leaves(tree)), strict=True))


def _names(tree: Any) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
