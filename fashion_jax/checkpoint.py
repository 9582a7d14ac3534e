"""Checkpoints: pytrees of arrays in a directory, verified whenever they are read.

orbax stores them, in the background, and removes old ones. It restores flipped bits without a word, though, so each
checkpoint has a seal: a file with the SHA-256 of the arrays and of every other file, written last. What has no seal was
never finished, and what does not match its seal is damaged; neither is used. A directory holds::

    DIR/fashion_jax.lock      held by the run that writes here
    DIR/12/                   the checkpoint of step 12: orbax's files
    DIR/12/seal.json          digests, and what the run is: config, data, seed, versions, devices
"""

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import math
import numbers
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from fashion_jax import __version__
from fashion_jax.files import PARTIAL, prepare_directory, write_atomically

SEAL, LOCK, FORMAT = "seal.json", "fashion_jax.lock", 1
logger: logging.Logger = logging.getLogger(__name__)


class Checkpoints(NamedTuple):
    """Where and how often a run is saved; `fit` and `sweep` take one, or just the directory.

    Attributes:
        directory: A directory of its own for each run; made if it is missing.
        every: Epochs between two checkpoints. The last epoch is always saved.
        keep: How many of the newest are kept at least, beside the one with the lowest validation loss. One more stays,
            because orbax removes old ones before the new one has its seal.
    """

    directory: str | os.PathLike[str]
    every: int = 1
    keep: int = 3

    @classmethod
    def of(cls, place: "Checkpoints | str | os.PathLike[str]") -> "Checkpoints":
        """Take a directory for `Checkpoints` that have nothing more to say.

        Args:
            place: What a caller of `fit` or `sweep` gave.

        Raises:
            TypeError: It is neither.

        >>> Checkpoints.of("runs").every
        1
        """
        found = place if isinstance(place, Checkpoints) else cls(place)
        if not isinstance(found.directory, (str, os.PathLike)):
            raise TypeError(f"checkpoint must be a directory or Checkpoints, got {found.directory!r}")
        return found

    def within(self, name: str) -> "Checkpoints":
        """Name a directory inside, for one run of several.

        Args:
            name: What to call it.

        >>> Checkpoints("runs", keep=1).within("first").directory.as_posix()
        'runs/first'
        """
        return self._replace(directory=Path(self.directory) / name)


class Checkpoint(NamedTuple):
    """What a directory gave back.

    Attributes:
        step: Its number.
        tree: NumPy arrays, in the structure that was asked for.
        identity: What the run is that made it.
        circumstances: What it ran on.
    """

    step: int
    tree: Any
    identity: dict[str, Any]
    circumstances: dict[str, Any]


class DamagedError(ValueError):
    """A checkpoint that does not match its seal, or a directory with nothing else."""


def content_digest(tree: Any) -> str:
    """Give the SHA-256 of a pytree of arrays: of every leaf's name, dtype, shape and bytes.

    Args:
        tree: Leaves are NumPy or JAX arrays.

    >>> ones = np.ones(3, np.float32)
    >>> content_digest({"a": ones}) == content_digest({"a": ones.copy()})
    True
    >>> content_digest({"a": ones}) == content_digest({"a": np.ones(3, np.float64)})
    False
    """
    digest = hashlib.sha256()
    for name, leaf in _flatten(tree).items():
        # NumPy has no letter of its own for types like bfloat16, nor a buffer.
        kind = leaf.dtype.name if leaf.dtype.kind == "V" else leaf.dtype.str
        digest.update(json.dumps([name, kind, leaf.shape]).encode())
        digest.update(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def restore(
    directory: str | os.PathLike[str], like: Any, *, identity: Mapping[str, Any] | None = None
) -> Checkpoint | None:
    """Read the newest checkpoint that is finished and not damaged; warn of newer ones that are not.

    Args:
        directory: Holds the checkpoints.
        like: A pytree with the structure that was saved. A leaf that is a `jax.ShapeDtypeStruct` tells the shape and
            the dtype that were saved; other leaves do not matter.
        identity: What the run has to be that made it; any if left out.

    Returns:
        The checkpoint, or None if none was ever finished.

    Raises:
        DamagedError: Some were finished, and all are damaged.
        TypeError: `like` holds typed keys.
        ValueError: The directory holds something else, or the checkpoint is another run's or has other arrays.

    >>> import tempfile
    >>> restore(tempfile.mkdtemp(), like={}) is None
    True
    """
    # orbax refuses relative paths.
    directory = Path(directory).absolute()
    _refuse_other_directories(directory)
    _refuse_keys(like)
    damaged = []
    for step in sorted(_steps(directory), reverse=True):
        path = directory / str(step)
        problem = f"{path} has no {SEAL}: it was never finished, or the file is lost"
        if _sealed(path):
            try:
                return _read(path, like, identity)
            except DamagedError as error:
                problem = str(error)
                damaged.append(problem)
        warnings.warn(f"{problem}; the checkpoint before it is used, if there is one", stacklevel=2)
    if damaged:
        raise DamagedError(
            f"no checkpoint in {directory} can be used ({'; '.join(damaged)}); remove the directory to start anew"
        )
    return None


class Store:
    """A directory that one run saves to: locked, saved in the background, rotated by orbax.

    Args:
        checkpoints: Which directory, and what is kept; or just the directory.
        identity: What the run is, as JSON values: a checkpoint of another run is refused. The number of steps is not
            part of it, so a run can be prolonged.
        circumstances: What it runs on, as JSON values; another device is reported, and accepted.

    Raises:
        TypeError, ValueError: A field of `checkpoints` is wrong.
        OSError: The directory cannot be written, or another run is using it.

    >>> import tempfile
    >>> tree = {"weights": np.ones(3)}
    >>> with Store(Checkpoints(tempfile.mkdtemp()), identity={"seed": 0}) as store:
    ...     assert store.restore(tree) is None
    ...     store.save(1, tree, loss=0.5)
    ...     store.wait()
    ...     print(store.restore(tree).step)
    1
    """

    def __init__(
        self,
        checkpoints: Checkpoints | str | os.PathLike[str],
        *,
        identity: Mapping[str, Any],
        circumstances: Mapping[str, Any] | None = None,
    ):
        checkpoints = Checkpoints.of(checkpoints)
        for name in ("every", "keep"):
            value = getattr(checkpoints, name)
            if not isinstance(value, numbers.Integral) or isinstance(value, bool):
                raise TypeError(f"checkpoint.{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"checkpoint.{name} must be at least 1, got {value}")
        self.directory: Path = Path(checkpoints.directory).absolute()
        self.every: int = checkpoints.every
        self._keep = checkpoints.keep
        self._identity = json.loads(json.dumps(identity))
        self._circumstances = json.loads(json.dumps({**(circumstances or {}), "versions": _versions()}))
        self._writes = jax.process_index() == 0
        self._manager: Any = None
        self._losses: dict[int, float] = {}
        self._background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: tuple[int, Future] | None = None
        self.saved: int | None = None
        _refuse_other_directories(self.directory)
        self._lock = self._take_lock() if self._writes else None

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self._manager is not None:
                with contextlib.suppress(Exception):
                    self._manager.close()
            if self._lock is not None:
                os.close(self._lock)

    def restore(self, like: Any) -> Checkpoint | None:
        """Read the newest good checkpoint of this run, and clear away what is newer or unfinished.

        Args:
            like: A pytree with the structure that was saved, as `restore` takes it.

        Raises:
            DamagedError: All checkpoints are damaged.
            TypeError: `like` holds typed keys, which cannot be saved.
            ValueError: The directory holds the checkpoints of another run; they are left alone.
        """
        found = restore(self.directory, like, identity=self._identity)
        if found is not None:
            for name, (then, now) in _differences(found.circumstances, self._circumstances).items():
                logger.info("%s was %s and is %s: going on within rounding, not bit by bit", name, then, now)
        if jax.process_count() > 1:
            step = -1 if found is None else found.step
            multihost_utils.assert_equal(
                np.int32(step), f"each process must see the same checkpoints in {self.directory}; share the directory"
            )
        if self._writes:
            for step in _steps(self.directory):
                path = self.directory / str(step)
                loss = _loss(path) if found is not None and step <= found.step else None
                if loss is None:
                    shutil.rmtree(path)
                else:
                    self._losses[step] = loss
        self.saved = None if found is None else found.step
        return found

    def save(self, step: int, tree: Any, *, loss: float) -> None:
        """Save a pytree; it is written in the background, after the one before it is complete.

        Args:
            step: Its number; higher than any before.
            tree: Leaves are NumPy arrays, which must not change until the next call.
            loss: The checkpoint with the lowest is kept.

        Raises:
            OSError: This checkpoint, or the one before, could not be written; what was complete stays.
            ValueError: `step` is not higher than that of the last checkpoint.
        """
        if self.saved is not None and step <= self.saved:
            raise ValueError(f"step must be higher than that of the last checkpoint, {self.saved}, got {step}")
        if self._writes:
            import orbax.checkpoint as ocp

            arrays = _flatten(tree)
            # Names become paths in orbax's store, where a slash means something; numbers do not.
            numbered = {str(i): array for i, array in enumerate(arrays.values())}
            self.wait()
            self._losses[step] = loss if math.isfinite(loss) else math.inf
            seal = {
                "format": FORMAT,
                "step": step,
                "loss": loss if math.isfinite(loss) else None,
                "identity": self._identity,
                "circumstances": self._circumstances,
                "names": list(arrays),
                "arrays": content_digest(tree),
            }
            with self._explained(step):
                manager = self._open(ocp)
                if not manager.save(step, args=ocp.args.StandardSave(numbered)):
                    raise OSError("orbax saved nothing, as where the directory holds a later step")
            self._saving = step, self._background.submit(self._seal, step, seal)
        self.saved = step

    def wait(self) -> None:
        """Wait until the last checkpoint is complete.

        Raises:
            OSError: It could not be written.
        """
        if self._saving is not None:
            step, saving = self._saving
            self._saving = None
            with self._explained(step):
                saving.result()

    def _open(self, ocp):
        if self._manager is None:
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self,
                    create=False,
                    cleanup_tmp_directories=True,
                    multiprocessing_options=ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}),
                ),
            )
        return self._manager

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tell orbax which checkpoints to keep: the newest, and the best."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = min(steps, key=lambda step: self._losses.get(step, math.inf), default=None)
        # One more than was asked for, because orbax removes old ones before the new one has its seal.
        newest = sorted(steps)[-self._keep - 1 :]
        return [step == best or step in newest for step in steps]

    def _seal(self, step: int, seal: dict[str, Any]) -> None:
        self._manager.wait_until_finished()
        path = self.directory / str(step)
        seal |= {"files": {name: _sha256(path / name) for name in _files(path)}}
        write_atomically(path / SEAL, json.dumps({**seal, "seal": _seal_digest(seal)}, indent=1))

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            complete = sorted(other for other in _steps(self.directory) if _sealed(self.directory / str(other)))
            kept = f"the checkpoint of step {complete[-1]} is intact" if complete else "there is none before it"
            message = f"cannot save step {step} to {self.directory}: {_first_line(error)}; {kept}"
            raise OSError(message) from error

    def _take_lock(self) -> int:
        prepare_directory(self.directory)
        lock = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system that has no locks lets everybody in.
            if isinstance(error, BlockingIOError):
                os.close(lock)
                raise BlockingIOError(
                    errno.EWOULDBLOCK,
                    "another run is saving its checkpoints here; wait for it, or name another directory",
                    str(self.directory),
                ) from None
        return lock


def _refuse_other_directories(directory: Path) -> None:
    """A directory in which checkpoints come and go must not hold anything else, nor have a name that orbax misreads."""
    # orbax looks for the files that it has written by a pattern, which the directory's own path is a part of.
    found = re.search(r"\[.*\]|\\|[\ud800-\udfff]", str(directory), re.DOTALL)
    if found:
        raise ValueError(
            f"checkpoints cannot be kept in {str(directory)!r}, because orbax misreads {found.group()!r} in a path; "
            "name another directory"
        )
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "checkpoints need a directory", str(directory))
    if directory.is_dir() and not (directory / LOCK).exists():
        # A run that was killed in its first moments has left no more than a probe.
        others = sorted(path.name for path in directory.iterdir() if not PARTIAL.fullmatch(path.name))
        if others:
            raise ValueError(
                f"{directory} is not a directory of checkpoints: it has no {LOCK}, and holds {others[0]!r}. "
                "Name an empty directory, or one that does not exist"
            )


def _steps(directory: Path) -> list[int]:
    return [int(path.name) for path in directory.glob("*") if path.name.isdecimal() and path.is_dir()]


def _sealed(path: Path) -> bool:
    return (path / SEAL).exists()


def _files(path: Path) -> list[str]:
    names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(name for name in names if Path(name).name != SEAL)


def _read_seal(path: Path) -> dict[str, Any]:
    try:
        seal = json.loads((path / SEAL).read_bytes())
        expected = seal.pop("seal")
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise DamagedError(f"{path / SEAL} is damaged: {error!r}") from error
    if expected != _seal_digest(seal):
        raise DamagedError(f"{path / SEAL} is damaged: its SHA-256 does not match")
    if seal["format"] != FORMAT:
        raise ValueError(f"{path} has format {seal['format']}, and this version reads {FORMAT}")
    return seal


def _loss(path: Path) -> float | None:
    """Give the loss of a checkpoint, or None if it was cut off, while it was written or while it was removed."""
    try:
        seal = _read_seal(path)
    except DamagedError:
        return None
    complete = set(seal["files"]) <= set(_files(path))
    return (math.inf if seal["loss"] is None else seal["loss"]) if complete else None


def _read(path: Path, like: Any, identity: Mapping[str, Any] | None) -> Checkpoint:
    import orbax.checkpoint as ocp

    seal = _read_seal(path)
    if identity is not None and (differences := _differences(seal["identity"], identity)):
        listed = "; ".join(f"{name} is {then} there and {now} here" for name, (then, now) in differences.items())
        raise ValueError(
            f"{path.parent} holds the checkpoints of another run: {listed}. Name another directory, or remove it"
        )
    for name, expected in seal["files"].items():
        file = path / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing")
        if _sha256(file) != expected:
            raise DamagedError(f"{file} is damaged: its SHA-256 does not match")
    if seal["step"] != int(path.name):
        raise DamagedError(f"{path} is the checkpoint of step {seal['step']}")
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(path / "default")
    except Exception as error:
        raise DamagedError(f"{path} cannot be read: {_first_line(error)}") from error
    names, structure = _names(like)
    if seal["names"] != names:
        wrong = sorted(set(seal["names"]) ^ set(names))
        raise ValueError(f"{path} holds other arrays than this run has: {', '.join(wrong)}")
    tree = jax.tree.unflatten(structure, [np.asarray(arrays[str(i)]) for i in range(len(names))])
    if content_digest(tree) != seal["arrays"]:
        raise DamagedError(f"{path} is damaged: the SHA-256 of its arrays does not match")
    for name, here, there in zip(names, jax.tree.leaves(like), jax.tree.leaves(tree), strict=True):
        if isinstance(here, jax.ShapeDtypeStruct) and (here.dtype, here.shape) != (there.dtype, there.shape):
            raise ValueError(
                f"{path.parent} holds the checkpoints of another run: {name} is {_told(there)} there and {_told(here)} "
                "here. Use the same network, optimiser and jax_enable_x64, or name another directory, or remove it"
            )
    return Checkpoint(seal["step"], tree, seal["identity"], seal["circumstances"])


def _names(tree: Any):
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves], structure


def _flatten(tree: Any) -> dict[str, np.ndarray]:
    names, _ = _names(tree)
    leaves = (jax.random.key_data(leaf) if _is_key(leaf) else leaf for leaf in jax.tree.leaves(tree))
    flat = dict(zip(names, map(np.asarray, leaves), strict=True))
    if len(flat) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two arrays would both be called {twice!r}; a name with a dot in it takes another's")
    return flat


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _refuse_keys(tree: Any) -> None:
    names, _ = _names(tree)
    for name, leaf in zip(names, jax.tree.leaves(tree), strict=True):
        if _is_key(leaf):
            raise TypeError(
                f"{name} is a typed key, and checkpoints hold plain arrays; let the optimiser keep jax.random.key_data "
                "of it, or give no checkpoint"
            )


def _told(array: Any) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), repr(error))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _seal_digest(seal: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(seal, sort_keys=True).encode()).hexdigest()


def _differences(then: Mapping[str, Any], now: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    differences: dict[str, tuple[Any, Any]] = {}
    for name in sorted({*then, *now}):
        was, is_ = then.get(name), now.get(name)
        if isinstance(was, Mapping) and isinstance(is_, Mapping):
            differences |= _differences(was, is_, f"{prefix}{name}.")
        elif was != is_:
            differences[prefix + name] = was, is_
    return differences


def _versions() -> dict[str, str]:
    # Not from metadata for this package: a checkout that is not installed has none.
    return {"fashion_jax": __version__, **{name: importlib.metadata.version(name) for name in ("jax", "jaxlib")}}
