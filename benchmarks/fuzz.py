"""Does damage go unnoticed? Thousands of files, damaged at random: each raises an error by name, or reads as it was."""

import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
from PIL import Image

from benchmarks import harness
from fashion_jax import catalog, checkpoint, data, files, images, sources


class Target(NamedTuple):
    """Sound files by name, and a function that says whether a directory holds the same content."""

    files: Mapping[str, bytes]
    load: Callable[[Path], bool]


class Outcome(NamedTuple):
    """The outcome of one case: "error by name", "read as it was", or one of `FAILURES`."""

    damage: str
    file: str
    end: str
    message: str


FAILURES = ("accepted with changed content", "error without a name", "another error")
# Each makes of a file's content c, two places a < b in it, and another file's content d what is written instead.
DAMAGES: dict[str, Callable[[bytes, int, int, bytes, np.random.Generator], bytes | None]] = {
    "flip a bit": lambda c, a, b, d, rng: c[:a] + bytes([c[a] ^ 1 << rng.integers(8)]) + c[a + 1 :],
    "change bytes": lambda c, a, b, d, rng: c[:a] + rng.bytes(b - a) + c[b:],
    "clear": lambda c, a, b, d, rng: c[:a] + bytes(b - a) + c[b:],
    "truncate": lambda c, a, b, d, rng: c[:a],
    "insert": lambda c, a, b, d, rng: c[:a] + rng.bytes(b - a) + c[a:],
    "delete": lambda c, a, b, d, rng: c[:a] + c[b:],
    "repeat": lambda c, a, b, d, rng: c[:b] + c[a:],
    "swap": lambda c, a, b, d, rng: c[b:] + c[:b],
    "take another file's content": lambda c, a, b, d, rng: d,
    "remove": lambda c, a, b, d, rng: None,
}


def run(target: Target, cases: int, seed: int) -> list[Outcome]:
    """Damage one file of a target again and again; each case has random numbers of its own."""
    return [_case(target, np.random.default_rng([seed, case])) for case in range(cases)]


def _case(target: Target, rng: np.random.Generator) -> Outcome:
    kind, name, other = (
        str(rng.choice(names)) for names in (list(DAMAGES), sorted(target.files), sorted(target.files))
    )
    content = target.files[name]
    # Every other time in the header, which says what follows.
    a = int(rng.integers(min(len(content) - 1, rng.choice([32, len(content)]))))
    b = min(len(content), a + int(rng.integers(1, 1000)))
    with tempfile.TemporaryDirectory() as place:
        for path, whole in target.files.items():
            written = whole if path != name else DAMAGES[kind](content, a, b, target.files[other], rng)
            if written is not None:
                (Path(place) / path).write_bytes(written)
        try:
            with warnings.catch_warnings(action="ignore"):
                end, message = ("read as it was" if target.load(Path(place)) else FAILURES[0]), ""
        except (ValueError, FileNotFoundError) as error:
            end, message = ("error by name" if place in str(error) else FAILURES[1]), str(error)
        except Exception as error:
            end, message = FAILURES[2], repr(error)
    return Outcome(kind, name, end, message)


def idx_bytes(array) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


@contextlib.contextmanager
def small_set(*, compressed: bool) -> Iterator[Target]:
    """Let `load` take a random data set of 20 images for the published one, and hide all others."""
    rng = np.random.default_rng(0)
    shapes = {name: (256, (20, 28, 28)) if "images" in name else (10, (20,)) for name in catalog.FILES}
    contents = {name: idx_bytes(rng.integers(high, size=shape)) for name, (high, shape) in shapes.items()}

    def load(directory: Path) -> bool:
        train, test = data.load(data_dir=directory, source="idx")
        return list(map(idx_bytes, (*train, *test))) == list(contents.values())

    digests = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    stored = {f"{name}.gz": gzip.compress(content) for name, content in contents.items()} if compressed else contents
    published = catalog.DATA_SETS["fashion_mnist"].digests
    with tempfile.TemporaryDirectory() as nowhere, mock.patch.dict(published, digests):
        places = {"XDG_CACHE_HOME": nowhere, "TFDS_DATA_DIR": nowhere}
        with mock.patch.dict(os.environ, places), mock.patch.object(sources, "DEBIAN_DIR", Path(nowhere)):
            yield Target(stored, load)


def any_idx_file(*, compressed: bool) -> contextlib.AbstractContextManager[Target]:
    """Damage an IDX file of no known digest.

    gzip's checksum protects the content; without it only the structure can be checked: what is accepted must be exactly
    what the file's header and bytes say.
    """
    content = idx_bytes(np.random.default_rng(0).integers(256, size=(12, 28, 28)))

    def load(directory: Path) -> bool:
        read = idx_bytes(sources.read_idx(directory / "file"))
        return read == (content if compressed else (directory / "file").read_bytes())

    return contextlib.nullcontext(Target({"file": gzip.compress(content) if compressed else content}, load))


def two_checkpoints() -> contextlib.AbstractContextManager[Target]:
    """Damage a directory with two checkpoints: one of them comes back as it was, or none."""

    def tree(epoch: int) -> dict[str, np.ndarray]:
        return {"weights": np.random.default_rng(epoch).random((20, 30), np.float32), "epoch": np.array(epoch)}

    def load(directory: Path) -> bool:
        with checkpoint.Store(directory, identity={"seed": 0}) as store:
            epoch, found = store.restore(tree(0))
        return epoch > 0 and files.digest(found) == files.digest(tree(epoch))

    with tempfile.TemporaryDirectory() as place:
        with checkpoint.Store(place, identity={"seed": 0}) as store:
            for epoch in (1, 2):
                store.save(epoch, lambda epoch=epoch: tree(epoch), best=epoch, last=True)
        contents = {path.name: path.read_bytes() for path in Path(place).glob("epoch-*")}
    return contextlib.nullcontext(Target(contents, load))


def picture(kind: str) -> contextlib.AbstractContextManager[Target]:
    """Damage a picture, of which a changed pixel goes unnoticed: what is accepted is an image."""
    content = io.BytesIO()
    shades = np.random.default_rng(0).integers(200, 256, (40, 40), np.uint8)
    shades[10:30, 15:25] = 0
    Image.fromarray(shades).save(content, kind)

    def load(directory: Path) -> bool:
        return images.read_image(directory / "file").shape == (28, 28)

    return contextlib.nullcontext(Target({"file": content.getvalue()}, load))


# Each makes a Target for the length of a block.
TARGETS: Mapping[str, Callable[[], contextlib.AbstractContextManager[Target]]] = {
    "load": lambda: small_set(compressed=False),
    "load, gzip": lambda: small_set(compressed=True),
    "read_idx: structure only": lambda: any_idx_file(compressed=False),
    "read_idx, gzip": lambda: any_idx_file(compressed=True),
    "checkpoint": two_checkpoints,
    **{f"picture, {kind}": partial(picture, kind) for kind in ("PNG", "JPEG", "WebP")},
}


@dataclasses.dataclass(frozen=True)
class Flags(harness.Flags):
    cases: int = 3000  # Damaged directories for each target.
    seed: int = 0  # Seed of the damage.


def main(flags: Flags) -> int:
    rows, failures = [], []
    for name, make in TARGETS.items():
        with make() as target:
            outcomes = run(target, flags.cases, flags.seed)
        ends = [outcome.end for outcome in outcomes]
        rows.append({"target": name} | {end: ends.count(end) for end in ("error by name", "read as it was", *FAILURES)})
        failures += [{"target": name} | outcome._asdict() for outcome in outcomes if outcome.end in FAILURES]
    harness.write("fuzz", rows, flags=flags, failures=failures)
    print(f"{flags.cases * len(rows):,} damaged cases, {len(failures)} failures")
    return int(bool(failures))


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
