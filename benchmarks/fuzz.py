"""Does damage go unnoticed? Thousands of files, damaged at random: each is refused by name, or read as it was."""

import contextlib
import dataclasses
import gzip
import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import numpy as np
import tyro

from benchmarks import harness
from fashion_jax import checkpoint, data

Files = dict[str, bytes]


class Target(NamedTuple):
    """What is damaged, and what reads it.

    Attributes:
        files: The sound files: path inside a directory, and content.
        load: Reads the directory, and tells whether it holds what the sound files hold.
        errors: What `load` may raise; the message has to name the directory.
        share: Only one in so many of the asked cases is run, where a case takes long.
    """

    files: Files
    load: Callable[[Path], bool]
    errors: tuple[type[Exception], ...]
    share: int = 1


class Outcome(NamedTuple):
    """How one case ended: "refused", "read as it was", or one of `FAILURES`."""

    damage: str
    file: str
    end: str
    message: str


FAILURES = ("accepted with changed content", "refused without a name", "another error")


def flip_a_bit(content: bytearray, rng: np.random.Generator) -> bytes:
    content[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return bytes(content)


def change_bytes(content: bytearray, rng: np.random.Generator) -> bytes:
    for position in rng.integers(len(content), size=rng.integers(1, 17)):
        content[position] = rng.integers(256)
    return bytes(content)


def change_the_header(content: bytearray, rng: np.random.Generator) -> bytes:
    content[rng.integers(min(32, len(content)))] = rng.integers(256)
    return bytes(content)


def truncate(content: bytearray, rng: np.random.Generator) -> bytes:
    return bytes(content[: rng.integers(len(content))])


def insert(content: bytearray, rng: np.random.Generator) -> bytes:
    at = rng.integers(len(content) + 1)
    return bytes(content[:at]) + rng.bytes(int(rng.integers(1, 1000))) + bytes(content[at:])


def delete(content: bytearray, rng: np.random.Generator) -> bytes:
    start, end = _chunk(content, rng)
    return bytes(content[:start] + content[end:])


def clear(content: bytearray, rng: np.random.Generator) -> bytes:
    start, end = _chunk(content, rng)
    return bytes(content[:start]) + bytes(end - start) + bytes(content[end:])


def repeat(content: bytearray, rng: np.random.Generator) -> bytes:
    start, end = _chunk(content, rng)
    return bytes(content[:end] + content[start:])


def swap_chunks(content: bytearray, rng: np.random.Generator) -> bytes:
    a, b, c = sorted(rng.integers(len(content) + 1, size=3))
    return bytes(content[:a] + content[b:c] + content[a:b] + content[c:])


DAMAGES = (flip_a_bit, change_bytes, change_the_header, truncate, insert, delete, clear, repeat, swap_chunks)


def damage(files: Files, rng: np.random.Generator) -> tuple[str, str, Files]:
    """Damage one file; now and then take it away, or put another one's content into it."""
    names = sorted(files)
    name = names[rng.integers(len(names))]
    kind = rng.integers(len(DAMAGES) + 2)
    if kind < len(DAMAGES):
        chosen = DAMAGES[kind]
        return chosen.__name__, name, files | {name: chosen(bytearray(files[name]), rng)}
    if kind == len(DAMAGES):
        return "remove", name, {other: content for other, content in files.items() if other != name}
    return "take another file's content", name, files | {name: files[names[rng.integers(len(names))]]}


def run(target: Target, cases: int, seed: int) -> list[Outcome]:
    """Damage the files of a target again and again; each case has random numbers of its own."""
    outcomes = []
    for case in range(cases):
        kind, name, files = damage(target.files, np.random.default_rng([seed, case]))
        with tempfile.TemporaryDirectory() as place:
            directory = Path(place)
            for path, content in files.items():
                (directory / path).parent.mkdir(parents=True, exist_ok=True)
                (directory / path).write_bytes(content)
            end, message = "read as it was", ""
            try:
                if not target.load(directory):
                    end = FAILURES[0]
            except target.errors as error:
                message = str(error)
                end = "refused" if place in message else FAILURES[1]
            except Exception as error:
                end, message = FAILURES[2], repr(error)
        outcomes.append(Outcome(kind, name, end, message))
    return outcomes


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@contextlib.contextmanager
def small_set(compressed: bool, images: int = 20) -> Iterator[Target]:
    """Let `load` take a small random data set for the published one, so that a case takes milliseconds."""
    rng = np.random.default_rng(0)
    contents = {}
    for name in data.DIGESTS:
        shape = (images, 28, 28) if "images" in name else (images,)
        contents[name] = idx_bytes(rng.integers(256 if "images" in name else 10, size=shape))
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    files = {f"{name}.gz": gzip.compress(content) for name, content in contents.items()} if compressed else contents
    with sealed(), mock.patch.dict(data.DIGESTS, digests):
        yield Target(files, lambda directory: _loads(directory, contents), (ValueError, FileNotFoundError))


@contextlib.contextmanager
def published_set() -> Iterator[Target]:
    """Damage the real files."""
    contents = dict(zip(data.DIGESTS, map(idx_bytes, _arrays(data.load())), strict=True))
    with sealed():
        yield Target(contents, lambda directory: _loads(directory, contents), (ValueError, FileNotFoundError), share=50)


@contextlib.contextmanager
def any_idx_file(compressed: bool) -> Iterator[Target]:
    """Read IDX files of no known digest.

    gzip's check sum protects the content; without it only the structure can be checked: what is accepted must be
    exactly what the file's header and bytes say.
    """
    array = np.random.default_rng(0).integers(256, size=(12, 28, 28))
    content = idx_bytes(array)

    def load(directory: Path) -> bool:
        path = directory / "file"
        read = data.read_idx(path)
        return idx_bytes(read) == (content if compressed else path.read_bytes())

    file = gzip.compress(content) if compressed else content
    yield Target({"file": file}, load, (ValueError, FileNotFoundError))


@contextlib.contextmanager
def two_checkpoints() -> Iterator[Target]:
    """Damage a directory with two checkpoints: one of them comes back as it was, or none."""

    def tree(step: int):
        return {"weights": np.random.default_rng(step).random((20, 30), np.float32), "step": np.array(step, np.int32)}

    def load(directory: Path) -> bool:
        with warnings.catch_warnings(action="ignore"):
            found = checkpoint.restore(directory, tree(0))
        return found is not None and checkpoint.content_digest(found.tree) == checkpoint.content_digest(
            tree(found.step)
        )

    with tempfile.TemporaryDirectory() as place:
        with checkpoint.Store(checkpoint.Checkpoints(place), identity={"seed": 0}) as store:
            for step in (1, 2):
                store.save(step, tree(step), loss=1.0 / step)
        paths = [path for path in Path(place).rglob("*") if path.is_file()]
        files = {str(path.relative_to(place)): path.read_bytes() for path in paths}
    # An empty file cannot be damaged; without the lock the directory is taken for another one.
    yield Target({name: content for name, content in files.items() if content}, with_lock(load), (ValueError,), share=3)


def with_lock(load: Callable[[Path], bool]) -> Callable[[Path], bool]:
    """Add the empty lock file to what is damaged."""

    def locked(directory: Path) -> bool:
        (directory / checkpoint.LOCK).touch()
        return load(directory)

    return locked


@contextlib.contextmanager
def sealed() -> Iterator[None]:
    """Hide the user's cache and the other places that `load` looks into."""
    with tempfile.TemporaryDirectory() as nowhere:
        places = {"XDG_CACHE_HOME": nowhere, "TFDS_DATA_DIR": nowhere}
        with mock.patch.dict(os.environ, places), mock.patch.object(data, "DEBIAN_DIR", Path(nowhere)):
            yield


# Each makes a Target for the length of a block.
TARGETS: Mapping[str, Callable[[], contextlib.AbstractContextManager[Target]]] = {
    "load, small set": lambda: small_set(compressed=False),
    "load, small set, gzip": lambda: small_set(compressed=True),
    "load, published files": published_set,
    "read_idx, plain: structure only": lambda: any_idx_file(compressed=False),
    "read_idx, gzip": lambda: any_idx_file(compressed=True),
    "checkpoint": two_checkpoints,
}


@dataclasses.dataclass(frozen=True)
class Flags:
    cases: int = 3000
    """Damaged directories for each target; one in 50 of them for the published files, one in 3 for checkpoints."""
    seed: int = 0
    """Seed of the damage."""
    targets: tuple[str, ...] = tuple(TARGETS)
    """What to damage."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


def main(flags: Flags) -> int:
    if unknown := set(flags.targets) - set(TARGETS):
        raise ValueError(f"--targets must be among {', '.join(TARGETS)}; got {', '.join(sorted(unknown))}")
    rows: list[harness.Row] = []
    failures: list[dict[str, Any]] = []
    for name in flags.targets:
        start = time.monotonic()
        with TARGETS[name]() as target:
            outcomes = run(target, max(1, flags.cases // target.share), flags.seed)
        ends = [outcome.end for outcome in outcomes]
        rows.append(
            {"target": name, "cases": len(ends)}
            | {end: ends.count(end) for end in ("refused", "read as it was", *FAILURES)}
            | {"seconds": round(time.monotonic() - start, 1)}
        )
        failures += [
            {"target": name, "case": case} | outcome._asdict()
            for case, outcome in enumerate(outcomes)
            if outcome.end in FAILURES
        ]
    total = sum(row["cases"] for row in rows)
    harness.write("fuzz", rows, flags=flags, output=flags.output, figure=None, cases=total, failures=failures)
    print(f"{total:,} damaged cases, {len(failures)} failures")
    return 1 if failures else 0


def _chunk(content: bytearray, rng: np.random.Generator) -> tuple[int, int]:
    start = int(rng.integers(len(content)))
    return start, min(len(content), start + int(rng.integers(1, 1000)))


def _arrays(splits: data.Splits) -> list[np.ndarray]:
    return [np.asarray(leaf) for batch in splits for leaf in batch]


def _loads(directory: Path, contents: Files) -> bool:
    return list(map(idx_bytes, _arrays(data.load(directory, source="idx")))) == list(contents.values())


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
