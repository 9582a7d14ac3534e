"""Sources of the data sets: IDX files, a data set of TensorFlow Datasets (TFDS), or a host on the web.

All yield the same arrays in the same order, verified by the SHA-256 of the published files. No user's file is changed.
"""

import concurrent.futures
import contextlib
import functools
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
from fashion_jax.catalog import FILES, DataSet
from fashion_jax.types import Batch, Splits

# How long the host may take for the first and smallest file, and how long it may fall silent after that.
PROBE_SECONDS = 4.0
STALL_SECONDS = 15.0
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")
TFDS_VERSION = "3.0.1"
GZIP = b"\x1f\x8b"

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


def cache_dir(name: str = "fashion_mnist") -> Path | None:
    """Return the user's cache of a data set, or of compiled "programs"; None without a home directory.

    Fashion-MNIST's is $XDG_CACHE_HOME/fashion_jax or ~/.cache/fashion_jax, the others have directories inside.
    """
    root = _user_dir("XDG_CACHE_HOME", "~/.cache")
    return root and (root / "fashion_jax" if name == "fashion_mnist" else root / "fashion_jax" / name)


def candidates(data_set: DataSet, source: str, named: Path | None) -> list[tuple[Any, Path]]:
    """Return readers and their directories, fastest first; a reader returns None where it finds no files."""
    debian = DEBIAN_DIR if data_set.name == "fashion_mnist" else None
    idx = (named, cache_dir(data_set.name), debian) if source in ("auto", "idx") else ()
    tfds = _tfds_dirs(data_set, named) if source in ("auto", "tfds") else ()
    read_files, read_tfds = (functools.partial(read, data_set) for read in (_read_files, _read_tfds))
    return [(read_files, place) for place in idx if place] + [(read_tfds, place) for place in tfds]


def contents(place: Path) -> str:
    """Return the names of the first entries of a directory, in words."""
    names = sorted(path.name for path in place.iterdir())
    return ", ".join(names[:8] + ["..."] * (len(names) > 8)) or "nothing"


def download(data_set: DataSet, named: Path | None) -> Splits:
    """Download the four files into the cache, unless they are there, and prepare them as a TFDS data set.

    One process at a time does this where a lock can be had; the others read what it has cached. The TFDS data set goes
    into `named` or, if that is None or occupied, into TFDS's own directory or the cache.

    Raises:
        ConnectionError: The host does not answer, or breaks off.
    """
    import filelock

    cache, lock = cache_dir(data_set.name), contextlib.nullcontext()
    with contextlib.suppress(OSError, NotImplementedError):
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            lock = filelock.FileLock(cache / ".lock").acquire()
    with lock:
        splits = None
        with contextlib.suppress(OSError, ValueError):
            splits = cache and _read_files(data_set, cache)
        if splits is None:
            splits = _fetch(data_set)
            _fill_cache(data_set, splits)
        _prepare_tfds(data_set, splits, _tfds_dirs(data_set, named))
    return splits


def _user_dir(variable: str, default: str) -> Path | None:
    try:
        return _checks.path(variable, os.environ.get(variable) or default)
    except ValueError:  # There is no home directory, or it is a bucket in the cloud.
        return None


def _tfds_dirs(data_set: DataSet, named: Path | None) -> list[Path]:
    places = (named, _user_dir("TFDS_DATA_DIR", "~/tensorflow_datasets"), cache_dir(data_set.name))
    return [place for place in places if place]


def _tfds_path(data_set: DataSet, place: Path) -> Path:
    return place / data_set.name / TFDS_VERSION


def _parse(content: bytes, origin: str) -> np.ndarray:
    try:
        if content[:2] == GZIP:
            content = gzip.decompress(content)
        if content[:3] != b"\0\0\x08":
            raise ValueError(f"it starts with {content[:4].hex(' ') or 'nothing'}")
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8)[4 + 4 * len(shape) :].reshape(shape)
    except (OSError, EOFError, zlib.error, ValueError, IndexError) as error:
        raise ValueError(f"{origin} is damaged, or no IDX file of unsigned bytes: {error}; fetch it again") from error


def _header(array: Any) -> bytes:
    """Return the start of an IDX file; the array's bytes follow."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()


def _verified(data_set: DataSet, name: str, array: np.ndarray, origin: str, gzipped: bytes | None = None) -> np.ndarray:
    if name in data_set.digests:
        whole = hashlib.sha256(_header(array))
        whole.update(array.data)
        digest, published = whole.hexdigest(), data_set.digests[name]
    elif gzipped is not None:
        digest, published = hashlib.sha256(gzipped).hexdigest(), data_set.digests[f"{name}.gz"]
    else:
        return array
    if digest != published:
        raise ValueError(f"{origin} does not hold {data_set.title}'s {name}, but SHA-256 {digest}; fetch it again")
    return array


def _splits(arrays: dict[str, np.ndarray], origin: Any) -> Splits:
    leaves = [arrays[name] if "images" in name else arrays[name].astype(np.int32) for name in FILES]
    for leaf in leaves:
        leaf.flags.writeable = False
    train, test = Batch(*leaves[:2]), Batch(*leaves[2:])
    # The only check of a file without a digest.
    if train.images.shape != (*train.labels.shape, *test.images.shape[1:]):
        raise ValueError(
            f"{origin} holds training images {list(train.images.shape)} for {len(train.labels):,} labels; fetch "
            f"{FILES[0]} again"
        )
    return Splits(train, test)


def _read_files(data_set: DataSet, place: Path) -> Splits | None:
    """Read the four IDX files of a directory, gzipped or not."""
    # All data sets have files of the same names, so a directory of the data set comes first, then torchvision's. Kaggle
    # puts each file into a directory of its own name.
    folders = (f"{data_set.name}/", f"{data_set.title.replace('-', '')}/raw/", "raw/", "")
    layouts = [folder + parent for folder in folders for parent in ("", "*-ubyte*/")]
    arrays, errors = {}, []
    for path in [path for layout in layouts for path in sorted(place.glob(f"{layout}*-ubyte*"))]:
        name = path.name.replace(".idx", "-idx").removesuffix(".gz")
        if name in FILES and name not in arrays and path.is_file():
            try:
                content = path.read_bytes()
                gzipped = content if content[:2] == GZIP else None
                arrays[name] = _verified(data_set, name, _parse(content, str(path)), str(path), gzipped)
            except (OSError, ValueError) as error:
                errors.append(error)
    missing = [name for name in FILES if name not in arrays]
    if missing and errors:
        raise errors[0]
    if missing and arrays:
        raise FileNotFoundError(f"{place} lacks {', '.join(missing)}; it holds {contents(place)}")
    return None if missing else _splits(arrays, place)


def _fill_cache(data_set: DataSet, splits: Splits) -> None:
    try:
        if (cache := cache_dir(data_set.name)) is None:
            raise FileNotFoundError("there is no home directory")
        for name, array in zip(FILES, (*splits.train, *splits.test), strict=True):
            files.write(cache / name, _header(array) + array.astype(np.uint8).tobytes())
    except OSError as error:
        _log.warning("the arrays were not cached, so the next load takes as long: %s", error)


def _fetch(data_set: DataSet) -> Splits:
    smallest, *others = reversed(FILES)
    first = concurrent.futures.Future()

    def probe():
        try:
            first.set_result(_get(data_set, smallest))
        except Exception as error:
            first.set_exception(error)

    # A thread, because a silent name server blocks for longer than any timeout of a socket.
    threading.Thread(target=probe, daemon=True).start()
    try:
        arrays = {smallest: first.result(PROBE_SECONDS)}
    except TimeoutError:
        raise ConnectionError(f"{data_set.url} (no answer within {PROBE_SECONDS:g} s)") from None
    _log.info("downloading %s (%d MB) from %s", data_set.title, data_set.megabytes, data_set.url)
    return _splits(arrays | {name: _get(data_set, name) for name in others}, data_set.url)


def _get(data_set: DataSet, name: str) -> np.ndarray:
    url, reason = f"{data_set.url}{name}.gz", None
    for _ in range(3):
        try:
            with urllib.request.urlopen(url, timeout=STALL_SECONDS) as response:
                content = response.read()
                return _verified(data_set, name, _parse(content, "the answer"), "the answer", content)
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            getattr(error, "close", bool)()  # An HTTPError keeps its connection open.
    raise ConnectionError(f"{url} ({reason})")


def _is_prepared(path: Path) -> bool:
    return any(path.glob("*.array_record*"))


def _read_tfds(data_set: DataSet, place: Path) -> Splits | None:
    """Read a data set that TFDS has prepared as array_record, and cache its arrays."""
    path, arrays = _tfds_path(data_set, place), {}
    if not _is_prepared(path):
        return None
    for split, stem in (("train", "train"), ("test", "t10k")):
        origin = f"{path}, split {split!r},"
        try:
            import tensorflow_datasets as tfds
            from tensorflow_datasets.core.hashing import Hasher

            builder: Any = tfds.builder_from_directory(path)
            source = builder.as_data_source(split)
            # All in one call, which array_record answers faster than record by record.
            examples = source.__getitems__(range(len(source)))
        except Exception as error:  # Each layer of TFDS raises its own for a damaged record.
            raise ValueError(f"{origin} cannot be read by TFDS: {error}") from error
        # TFDS stores examples in the order of their keys' hashes; the keys count the examples as published.
        order = np.argsort(sorted(range(len(examples)), key=Hasher(split).hash_key))
        for name, field in ((f"{stem}-images-idx3-ubyte", "image"), (f"{stem}-labels-idx1-ubyte", "label")):
            rows = np.array([example[field] for example in examples]).astype(np.uint8)[order]
            arrays[name] = _verified(data_set, name, rows.reshape(rows.shape[:3]), origin)
    splits = _splits(arrays, path)
    _fill_cache(data_set, splits)
    return splits


def _prepare_tfds(data_set: DataSet, splits: Splits, places: list[Path]) -> None:
    """Prepare the data set in the first place that is free, as stock TFDS does with TensorFlow."""
    # Stock TFDS writes tfrecord, which only TensorFlow reads: such a data set keeps its place.
    paths = [(place, _tfds_path(data_set, place)) for place in places]
    place, path = next((pair for pair in paths if _is_prepared(pair[1]) or not pair[1].exists()), (None, None))
    if path is None or _is_prepared(path):
        return
    try:
        import PIL.Image
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import registered

        stock = tfds.builder_cls(data_set.name)
        with registered.skip_registration():

            class Prepared(stock):
                name = data_set.name

                def _split_generators(self, dl_manager):
                    return {split: self._generate_examples(batch) for split, batch in splits._asdict().items()}

                def _generate_examples(self, batch):
                    for i, (image, label) in enumerate(zip(*batch, strict=True)):
                        png = io.BytesIO()
                        PIL.Image.fromarray(image).save(png, "PNG")
                        yield i, {"image": png.getvalue(), "label": int(label)}

        Prepared(data_dir=place, file_format="array_record").download_and_prepare()  # pyright: ignore
    except Exception as error:  # Each layer of TFDS raises its own for a full disk.
        _log.warning("no TFDS data set was prepared in %s: %s", place, error)
