"""Where Fashion-MNIST comes from: IDX files, a data set of TensorFlow Datasets (TFDS), or its authors' host.

All yield the same arrays in the same order, verified by the SHA-256 of the published files. No user's file is changed.
"""

import concurrent.futures
import contextlib
import gzip
import hashlib
import http.client
import io
import logging
import os
import threading
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from fashion_jax import _checks, files
from fashion_jax.types import Batch, Splits

URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# How long the host may take for the first and smallest file, and how long it may fall silent after that.
PROBE_SECONDS = 4.0
STALL_SECONDS = 15.0
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
TFDS_NAME = "fashion_mnist/3.0.1"

# SHA-256 of the four published files, uncompressed: gzip headers differ from copy to copy.
DIGESTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

_log = logging.getLogger(__name__)


def read_idx(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "..."]:
    """Read one IDX file of unsigned bytes, gzipped or not.

    The format has no checksum: a changed pixel in a file that is not gzipped goes unnoticed here.

    Returns:
        A read-only array of the shape in the file's header.

    Raises:
        ValueError: The gzip stream is damaged, or header and length do not fit.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "labels"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
    >>> read_idx(path).tolist()
    [7, 8, 9]
    """
    return _parse(_checks.path("path", path).read_bytes(), str(path))


def cache_dir() -> Path | None:
    """Return the user's cache, $XDG_CACHE_HOME/fashion_jax or ~/.cache/fashion_jax; None without a home directory."""
    root = _user_dir("XDG_CACHE_HOME", "~/.cache")
    return root and root / "fashion_jax"


def candidates(source: str, named: Path | None) -> list[tuple[Any, Path]]:
    """Return readers and their directories, fastest first; a reader returns None where it finds no files."""
    idx = (named, cache_dir(), DEBIAN_DIR) if source in ("auto", "idx") else ()
    tfds = _tfds_dirs(named) if source in ("auto", "tfds") else ()
    return [(_read_files, place) for place in idx if place] + [(_read_tfds, place) for place in tfds]


def contents(place: Path) -> str:
    """Return the names of the first entries of a directory, in words."""
    names = sorted(path.name for path in place.iterdir())
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "nothing"


def download(named: Path | None) -> Splits:
    """Download the four files into the cache, unless they are there, and prepare them as a TFDS data set.

    One process at a time does this where a lock can be had; the others read what it has cached. The TFDS data set goes
    into `named` or, if that is None or occupied, into TFDS's own directory or the cache.

    Raises:
        ConnectionError: The host does not answer, or breaks off.
    """
    import filelock

    cache, lock = cache_dir(), contextlib.nullcontext()
    with contextlib.suppress(OSError, NotImplementedError):
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(cache / ".lock").acquire()
    with lock:
        splits = None
        with contextlib.suppress(OSError, ValueError):
            splits = cache and _read_files(cache)
        if splits is None:
            splits = _fetch()
            _fill_cache(splits)
        _prepare_tfds(splits, _tfds_dirs(named))
    return splits


def _user_dir(variable: str, default: str) -> Path | None:
    try:
        return _checks.path(variable, os.environ.get(variable) or default)
    except ValueError:  # There is no home directory, or it is a bucket in the cloud.
        return None


def _tfds_dirs(named: Path | None) -> list[Path]:
    return [place for place in (named, _user_dir("TFDS_DATA_DIR", "~/tensorflow_datasets"), cache_dir()) if place]


def _parse(content: bytes, origin: str) -> np.ndarray:
    try:
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        if content[:3] != b"\0\0\x08":
            raise ValueError(f"it starts with {content[:4].hex(' ') or 'nothing'}")
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8)[4 + 4 * len(shape) :].reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise ValueError(f"{origin} is damaged, or no IDX file of unsigned bytes: {error}; fetch it again") from error


def _as_idx(array: Any) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def _verified(name: str, array: np.ndarray, origin: str) -> np.ndarray:
    digest = hashlib.sha256(_as_idx(array)).hexdigest()
    if digest != DIGESTS[name]:
        raise ValueError(f"{origin} does not hold the published {name}, but SHA-256 {digest}; fetch it again")
    return array


def _splits(arrays: dict[str, np.ndarray]) -> Splits:
    leaves = [arrays[name] if "images" in name else arrays[name].astype(np.int32) for name in DIGESTS]
    for leaf in leaves:
        leaf.flags.writeable = False
    return Splits(Batch(*leaves[:2]), Batch(*leaves[2:]))


def _read_files(place: Path) -> Splits | None:
    """Read the four IDX files of a directory, gzipped or not."""
    # As published, under torchvision's root, and as Kaggle has them: each in a directory of its own name.
    layouts = [folder + parent for folder in ("", "raw/", "FashionMNIST/raw/") for parent in ("", "*-ubyte*/")]
    arrays, errors = {}, []
    for path in [path for layout in layouts for path in sorted(place.glob(f"{layout}*-ubyte*"))]:
        name = path.name.replace(".idx", "-idx").removesuffix(".gz")
        if name in DIGESTS and name not in arrays and path.is_file():
            try:
                arrays[name] = _verified(name, read_idx(path), str(path))
            except (OSError, ValueError) as error:
                errors.append(error)
    missing = [name for name in DIGESTS if name not in arrays]
    if missing and errors:
        raise errors[0]
    if missing and arrays:
        raise FileNotFoundError(f"{place} lacks {', '.join(missing)}; it holds {contents(place)}")
    return None if missing else _splits(arrays)


def _fill_cache(splits: Splits) -> None:
    try:
        if (cache := cache_dir()) is None:
            raise FileNotFoundError("there is no home directory")
        for name, array in zip(DIGESTS, (*splits.train, *splits.test), strict=True):
            files.write(cache / name, _as_idx(array))
    except OSError as error:
        _log.warning("the arrays were not cached, so the next load takes as long: %s", error)


def _fetch() -> Splits:
    smallest, *others = reversed(DIGESTS)
    first = concurrent.futures.Future()

    def probe():
        try:
            first.set_result(_get(smallest))
        except Exception as error:
            first.set_exception(error)

    # A thread, because a silent name server blocks for longer than any timeout of a socket.
    threading.Thread(target=probe, daemon=True).start()
    try:
        arrays = {smallest: first.result(PROBE_SECONDS)}
    except TimeoutError:
        raise ConnectionError(f"{URL} (no answer within {PROBE_SECONDS:g} s)") from None
    _log.info("downloading Fashion-MNIST (30 MB) from %s", URL)
    return _splits(arrays | {name: _get(name) for name in others})


def _get(name: str) -> np.ndarray:
    reason: Any = None
    for _ in range(3):
        try:
            with urllib.request.urlopen(f"{URL}{name}.gz", timeout=STALL_SECONDS) as response:
                return _verified(name, _parse(response.read(), "the answer"), "the answer")
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            getattr(error, "close", bool)()  # An HTTPError keeps its connection open.
    raise ConnectionError(f"{URL}{name}.gz ({reason})")


def _is_prepared(place: Path) -> bool:
    return any(place.glob(f"{TFDS_NAME}/*.array_record*"))


def _read_tfds(place: Path) -> Splits | None:
    """Read a data set that TFDS has prepared as array_record, and cache its arrays."""
    if not _is_prepared(place):
        return None
    arrays = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        origin = f"{place / TFDS_NAME}, split {split!r},"
        try:
            import tensorflow_datasets as tfds
            from tensorflow_datasets.core.hashing import Hasher

            builder: Any = tfds.builder_from_directory(place / TFDS_NAME)
            source = builder.as_data_source(split)
            # All in one call, which array_record answers faster than record by record.
            examples = source.__getitems__(range(len(source)))
        except Exception as error:  # Each layer of TFDS raises its own for a damaged record.
            raise ValueError(f"{origin} cannot be read by TFDS: {error}") from error
        # TFDS stores examples in the order of their keys' hashes; the keys count the examples as published.
        order = np.argsort(sorted(range(len(examples)), key=Hasher(split).hash_key))
        for name, field in ((f"{stem}-images-idx3-ubyte", "image"), (f"{stem}-labels-idx1-ubyte", "label")):
            rows = np.array([example[field] for example in examples]).astype(np.uint8)[order]
            arrays[name] = _verified(name, rows.reshape(rows.shape[:3]), origin)
    splits = _splits(arrays)
    _fill_cache(splits)
    return splits


def _prepare_tfds(splits: Splits, places: list[Path]) -> None:
    """Prepare the data set in the first place that is free, as stock TFDS does with TensorFlow."""
    # Stock TFDS writes tfrecord, which only TensorFlow reads: such a data set keeps its place.
    place = next((place for place in places if _is_prepared(place) or not (place / TFDS_NAME).exists()), None)
    if place is None or _is_prepared(place):
        return
    try:
        import PIL.Image
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import registered

        stock = tfds.builder_cls("fashion_mnist")
        with registered.skip_registration():

            class FashionMnist(stock):
                def _split_generators(self, dl_manager):
                    return {split: self._generate_examples(batch) for split, batch in splits._asdict().items()}

                def _generate_examples(self, batch):
                    for i, (image, label) in enumerate(zip(*batch, strict=True)):
                        png = io.BytesIO()
                        PIL.Image.fromarray(image).save(png, "PNG")
                        yield i, {"image": png.getvalue(), "label": int(label)}

        FashionMnist(data_dir=place, file_format="array_record").download_and_prepare()  # pyright: ignore
    except Exception as error:  # Each layer of TFDS raises its own for a full disk.
        _log.warning("no TFDS data set was prepared in %s: %s", place, error)
