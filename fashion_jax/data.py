"""Where the arrays come from: Fashion-MNIST from local files or TFDS, and parts of it.

Whatever the source, the arrays are the same, in the same order: each is checked against the SHA-256 of the file that
the data set's authors published. `python -m fashion_jax.data` fetches the data and tells what is there.
"""

import argparse
import contextlib
import gzip
import hashlib
import http.client
import io
import logging
import math
import numbers
import os
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int, Key, UInt8

from fashion_jax.files import locked, prepare_directory, remove_partial, scratch_directory, write_atomically

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
SOURCES = ("auto", "idx", "tfds", "download")
DATA_VARIABLE = "FASHION_JAX_DATA"
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
# How long the host may take to answer at all, to send the next byte, and to send one file.
PROBE_SECONDS = 3.0
STALL_SECONDS = 10.0
DOWNLOAD_SECONDS = 600.0
DEBIAN_DIR = Path("/usr/share/datasets/fashion-mnist")

# SHA-256 of the four published files, uncompressed: gzip headers differ from copy to copy.
DIGESTS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

_log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Images and their labels; a data set is one large batch.

    Attributes:
        images: Pixels as they are stored, 0 (background) to 255; Fashion-MNIST's are grey, 28x28.
        labels: Index of each image's class, in `CLASS_NAMES` for Fashion-MNIST.
    """

    images: UInt8[Array | np.ndarray, "n height width *channels"]
    labels: Int[Array | np.ndarray, " n"]


class Splits(NamedTuple):
    """The official division: 60,000 training and 10,000 test images."""

    train: Batch
    test: Batch


def load(data_dir: str | os.PathLike[str] | None = None, *, source: str = "auto") -> Splits:
    """Load Fashion-MNIST from the fastest source that is there.

    Sources, fastest first:

    - idx: The four IDX files, gzipped or not, in `data_dir` (or its FashionMNIST/raw, where torchvision puts them), in
      the user's cache, or where Debian's package dataset-fashion-mnist puts them.
    - tfds: A data set that TFDS has prepared as array_record, in `data_dir`, in $TFDS_DATA_DIR or in
      ~/tensorflow_datasets. Its arrays are put into the user's cache, as uncompressed IDX files.
    - download: The four files are fetched and prepared as a TFDS data set first; TensorFlow is not needed. Of several
      processes one does it, the others wait for it.
    - auto: The first of these that is there; one log line says which.

    Args:
        data_dir: Directory to look in first; by default the one that $FASHION_JAX_DATA names, if any.
        source: One of `SOURCES`.

    Returns:
        The 60,000 training and 10,000 test examples, as read-only NumPy arrays, in the published order.

    Raises:
        TypeError: `data_dir` is not a path.
        ValueError: A file does not hold what was published, or `source` is unknown.
        FileNotFoundError: The directory, or a file of the four, is missing; or no source has the data.
        OSError: A file cannot be read or written, or the download breaks off or stalls for `STALL_SECONDS`.

    >>> train, test = load()
    >>> train.images.shape, test.labels.shape
    ((60000, 28, 28), (10000,))
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {source!r}")
    named_by = "data_dir"
    if data_dir is None and os.environ.get(DATA_VARIABLE):
        data_dir, named_by = os.environ[DATA_VARIABLE], f"${DATA_VARIABLE}"
    if not isinstance(data_dir, (str, os.PathLike, type(None))):
        raise TypeError(f"data_dir must be a path, got {data_dir!r}")
    directory = None if data_dir is None else _expanded(data_dir)
    if directory is not None and not directory.is_dir() and source != "download":
        state = "is not a directory" if directory.exists() else "does not exist"
        raise FileNotFoundError(
            f"{named_by} {state}: {directory}; create it, or fetch the data into it with source='download'"
        )
    remove_partial(cache_dir())
    if source in ("auto", "idx") and (splits := _from_idx(directory, (cache_dir(), DEBIAN_DIR))):
        return splits
    if source in ("auto", "tfds") and (splits := _from_tfds(directory)):
        return splits
    if source in ("auto", "download"):
        return _from_download(directory)
    raise FileNotFoundError(_advice(f"source {source!r} has no data"))


def hold_out(batch: Batch, fraction: float, *, key: Key[Array, ""]) -> tuple[Batch, Batch]:
    """Split off a random part, with the same share of each class.

    Args:
        batch: The n examples to split.
        fraction: Share of the examples that goes into the second part, in (0, 1).
        key: Decides which.

    Returns:
        The rest, and the part held out, of round(fraction * n) examples. Both keep the order of `batch`.

    Raises:
        TypeError: `fraction` is not a number, or `key` not one typed key.
        ValueError: `fraction` is outside (0, 1), or one part would be empty.

    >>> batch = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> rest, held_out = hold_out(batch, 0.2, key=jax.random.key(0))
    >>> len(rest.labels), np.bincount(held_out.labels).tolist()
    (80, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    check_batch(batch, "batch", classes=None)
    check_key(key)
    if not isinstance(fraction, numbers.Real) or isinstance(fraction, bool):
        raise TypeError(f"fraction must be a number in (0, 1), got {fraction!r}")
    n = len(batch.labels)
    size = round(fraction * n) if math.isfinite(fraction) else 0
    if not 0 < fraction < 1 or not 0 < size < n:
        raise ValueError(f"fraction must lie in (0, 1) and leave both parts non-empty, got {fraction} of {n} examples")
    order = _stratified_order(batch.labels, key)
    return _take(batch, order[size:]), _take(batch, order[:size])


def subset(batch: Batch, size: int, *, key: Key[Array, ""]) -> Batch:
    """Choose a random part of a given size, with the same share of each class.

    Parts of one key are nested: the first 1,000 are among the first 5,000.

    Args:
        batch: The n examples to choose from.
        size: How many to take, 1 to n.
        key: Decides which.

    Returns:
        `size` examples, in the order of `batch`.

    Raises:
        TypeError: `size` is not an int, or `key` not one typed key.
        ValueError: `size` is out of range.

    >>> batch = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100, dtype=np.int32) % 10)
    >>> np.bincount(subset(batch, 30, key=jax.random.key(0)).labels).tolist()
    [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    """
    check_batch(batch, "batch", classes=None)
    check_key(key)
    if not isinstance(size, numbers.Integral) or isinstance(size, bool):
        raise TypeError(f"size must be an int, got {size!r}")
    n = len(batch.labels)
    if not 1 <= size <= n:
        raise ValueError(f"size must lie between 1 and the {n} examples that there are, got {size}")
    return _take(batch, _stratified_order(batch.labels, key)[:size])


def check_batch(batch: Batch, name: str, *, classes: int | None = len(CLASS_NAMES)) -> None:
    """Refuse what cannot be a data set; of traced arrays, whose values are not known yet, types and shapes only.

    Args:
        batch: Images [n, height, width] and labels [n].
        name: What to call it in the error.
        classes: Number of classes that labels may name; None allows any.

    Raises:
        TypeError: It is no `Batch`, the images are not uint8 or the labels not integers.
        ValueError: Shapes do not fit, there is no example, or a label names no class.

    >>> check_batch(Batch(np.ones((1, 28, 28), np.uint8), np.array([10])), "train")
    Traceback (most recent call last):
    ValueError: train.labels must lie in 0..9, got 10..10
    """
    if not (isinstance(batch, Batch) and all(hasattr(leaf, "dtype") for leaf in batch)):
        raise TypeError(f"{name} must be a Batch of two arrays, got {type(batch).__name__}")
    for part, leaf in batch._asdict().items():
        if not isinstance(leaf.dtype, np.dtype):
            raise TypeError(
                f"{name}.{part} must be an array of NumPy or JAX, got {type(leaf).__module__}.{type(leaf).__name__} of "
                f"{leaf.dtype}; PyTorch's tensors have .numpy()"
            )
    images, labels = batch
    check_pixels(images, f"{name}.images")
    if not jnp.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"{name}.labels must be integers, got {labels.dtype}")
    if images.ndim < 3 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{name} must hold images [n, height, width] and labels [n], got {images.shape} and {labels.shape}"
        )
    if not len(labels):
        raise ValueError(f"{name} must hold at least one example, got none")
    if isinstance(labels, Tracer):
        return
    # NumPy's, because inside somebody's jit JAX would trace even what is known.
    values = np.asarray(labels)
    smallest, largest = int(values.min()), int(values.max())
    if smallest < 0 or (classes is not None and largest >= classes):
        expected = "be at least 0" if classes is None else f"lie in 0..{classes - 1}"
        raise ValueError(f"{name}.labels must {expected}, got {smallest}..{largest}")


def check_pixels(images: Any, name: str) -> None:
    """Refuse images that are not pixels as they are stored, such as pixels that somebody has scaled.

    Args:
        images: An array of any shape.
        name: What to call it in errors.

    Raises:
        TypeError: It is not an array of uint8.

    >>> check_pixels(np.array([[0.0, 0.5]]), "images")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    TypeError: images must be uint8 pixels from 0 to 255, got float64 from 0 to 0.5. These look scaled: ...
    """
    if getattr(images, "dtype", None) != np.uint8:
        raise TypeError(f"{name} must be uint8 pixels from 0 to 255, got {_described(images)}")


def check_key(key: Any) -> None:
    """Refuse what is not one typed key, such as a seed, several keys, or a key of the old kind.

    Args:
        key: From `jax.random.key`.

    Raises:
        TypeError: It is something else.

    >>> check_key(jax.random.PRNGKey(0))
    Traceback (most recent call last):
    TypeError: key must be one typed key, from jax.random.key(seed); got Array([0, 0], dtype=uint32)
    """
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()):
        raise TypeError(f"key must be one typed key, from jax.random.key(seed); got {key!r}")


def read_idx(path: str | os.PathLike[str]) -> UInt8[np.ndarray, "..."]:
    """Read one IDX file of unsigned bytes, gzipped or not.

    The format has no check sum, so a changed pixel in a file that is not gzipped goes unnoticed here; `load` compares
    the published files with their digests.

    Args:
        path: The file.

    Returns:
        A read-only array of the shape that the header tells.

    Raises:
        ValueError: The gzip stream is damaged, or the header and the length do not fit.
        OSError: The file cannot be read.

    Source: the format's description on Yann LeCun's MNIST page.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "labels"
    >>> _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))
    >>> read_idx(path).tolist()
    [7, 8, 9]
    """
    return _parsed(Path(path).read_bytes(), path)


def cache_dir() -> Path:
    """Tell where this package keeps files for the user: $XDG_CACHE_HOME/fashion_jax or ~/.cache/fashion_jax.

    >>> cache_dir().name
    'fashion_jax'
    """
    return _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "fashion_jax"


def _expanded(path: str | os.PathLike[str]) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(f"{path} names no directory: {error}") from None


def _stratified_order(labels, key) -> np.ndarray:
    """Order the examples at random so that every prefix holds each class in proportion."""
    permutation = np.asarray(jax.random.permutation(key, len(labels)))
    shuffled = np.asarray(labels)[permutation]
    # Labels may be any ints, and huge ones.
    _, shuffled, counts = np.unique(shuffled, return_inverse=True, return_counts=True)
    by_class = np.argsort(shuffled, kind="stable")
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return permutation[np.lexsort((shuffled, (rank + 0.5) / counts[shuffled]))]


def _described(images) -> str:
    """Tell what images are that are not uint8, and what to do about it."""
    if not hasattr(images, "dtype"):
        return type(images).__name__
    if not images.size or isinstance(images, Tracer) or not jnp.issubdtype(images.dtype, np.number):
        return f"{images.dtype}"
    low, high = float(images.min()), float(images.max())
    found = f"{images.dtype} from {low:g} to {high:g}"
    if low >= 0 and high <= 1:
        return (
            f"{found}. These look scaled: hand over the pixels as they were before, the model standardises them itself"
        )
    if low >= 0 and high <= 255:
        return f"{found}. If these are unscaled pixels, convert them with .astype(np.uint8)"
    return f"{found}. The model standardises pixels itself, so hand them over as they were before"


def _take(batch: Batch, indices) -> Batch:
    indices = np.sort(indices)
    return Batch(np.asarray(batch.images)[indices], np.asarray(batch.labels)[indices])


def _parsed(content: bytes, origin: str | os.PathLike[str]) -> np.ndarray:
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{origin}: damaged gzip file ({error}); fetch it again") from error
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ValueError(
            f"{origin}: not an IDX file of unsigned bytes: it starts with {content[:4].hex(' ') or 'nothing'}"
        )
    header = 4 + 4 * content[3]
    if len(content) < header:
        raise ValueError(f"{origin}: the IDX header is cut short after {len(content)} bytes")
    shape = tuple(int(count) for count in np.frombuffer(content[4:header], ">u4"))
    pixels = np.frombuffer(content, np.uint8)[header:]
    if len(pixels) != math.prod(shape):
        raise ValueError(
            f"{origin}: the IDX header tells {list(shape)}, {math.prod(shape)} bytes, but {len(pixels)} follow"
        )
    try:
        return pixels.reshape(shape)
    except ValueError as error:
        raise ValueError(f"{origin}: the IDX header tells {list(shape)}, which no array can have ({error})") from error


def _as_idx(array) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


def _verified(arrays: dict[str, np.ndarray], origin: dict[str, str]) -> Splits:
    """Make Splits of the four arrays, or say which one does not hold what was published."""
    for name, array in arrays.items():
        _check_published(name, array, origin[name])
    return _splits(arrays)


def _splits(arrays: dict[str, np.ndarray]) -> Splits:
    images = [arrays[name] for name in DIGESTS if "images" in name]
    labels = [arrays[name].astype(np.int32) for name in DIGESTS if "labels" in name]
    for array in labels:
        array.flags.writeable = False
    return Splits(*map(Batch, images, labels))


def _check_published(name: str, array: np.ndarray, origin: str) -> None:
    digest = hashlib.sha256(_as_idx(array)).hexdigest()
    if digest != DIGESTS[name]:
        held = next((f"the content of {other}" for other, published in DIGESTS.items() if published == digest), None)
        raise ValueError(
            f"{origin}: expected the published {name} with SHA-256 {DIGESTS[name]}, found "
            f"{held or f'{list(array.shape)} bytes{_range(array)} with SHA-256 {digest}'}; fetch it again"
        )


def _range(array) -> str:
    return f" from {array.min()} to {array.max()}" if array.size else ""


def _from_idx(directory: Path | None, others: tuple[Path, ...]) -> Splits | None:
    places = [] if directory is None else [directory, directory / "FashionMNIST" / "raw"]
    for place in [*places, *others]:
        try:
            splits = _from_cache(place) if place == cache_dir() else _from_place(place)
        except PermissionError as error:
            if place in places:
                raise
            _log.warning("passing over what may not be read: %s", error)
            continue
        if splits is not None:
            _log.info("Fashion-MNIST from the IDX files in %s", place)
            return splits
    return None


def _spellings(place: Path, name: str) -> list[Path]:
    return [path for suffix in ("", ".gz") if (path := place / (name + suffix)).is_file()]


def _from_place(place: Path) -> Splits | None:
    found = {name: paths[0] for name in DIGESTS if (paths := _spellings(place, name))}
    if not found:
        return None
    missing = DIGESTS.keys() - found.keys()
    if missing:
        raise FileNotFoundError(f"{place} lacks {', '.join(sorted(missing))} beside the other IDX files")
    arrays = {name: read_idx(path) for name, path in found.items()}
    return _verified(arrays, {name: str(path) for name, path in found.items()})


def _from_cache(place: Path) -> Splits | None:
    """Read our own files, and remove those that are damaged; what is lacking then is fetched again."""
    arrays: dict[str, np.ndarray] = {}
    for name in DIGESTS:
        for path in _spellings(place, name):
            try:
                array = read_idx(path)
                _check_published(name, array, str(path))
            except PermissionError:
                raise
            except ValueError as error:
                _log.warning("removing a damaged file from the cache: %s", error)
                with contextlib.suppress(OSError):
                    path.unlink()
            else:
                arrays[name] = array
                break
    return _splits(arrays) if arrays.keys() == DIGESTS.keys() else None


def _tfds_dirs(directory: Path | None) -> list[Path]:
    default = _expanded(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    return [default] if directory is None else [directory, default]


def _prepared(place: Path) -> list[Path]:
    # Versions have numbers; what TFDS has not finished is called incomplete.* beside them.
    return sorted(place.glob("fashion_mnist/[0-9]*/dataset_info.json"))


def _from_tfds(directory: Path | None) -> Splits | None:
    for place in _tfds_dirs(directory):
        for info in _prepared(place):
            if not any(info.parent.glob("*.array_record*")):
                _log.warning("%s is not prepared as array_record, which reading without TensorFlow needs", info.parent)
                continue
            splits = _read_tfds(place)
            _log.info("Fashion-MNIST from the TFDS data set in %s", info.parent)
            _fill_cache(splits)
            return splits
    return None


def _read_tfds(place: Path) -> Splits:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.hashing import Hasher

    _log.info("reading 70,000 images through TFDS, about 10 s")
    arrays, origin = {}, {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        try:
            source: Any = tfds.data_source("fashion_mnist", split=split, data_dir=place, download=False)
            # All in one call, which array_record answers quicker than record by record.
            examples = source.__getitems__(range(len(source)))
        except Exception as error:  # Each layer of TFDS has its own errors for a damaged record.
            raise ValueError(f"{place}/fashion_mnist: TFDS cannot read the split {split!r}: {error}") from error
        # TFDS stores examples in the order of their keys' hashes; the keys count the examples as published.
        hasher = Hasher(split)
        stored = np.array(sorted(range(len(examples)), key=hasher.hash_key), np.int64)
        published = np.argsort(stored)
        for part, field in (("images-idx3", "image"), ("labels-idx1", "label")):
            name = f"{stem}-{part}-ubyte"
            rows = np.array([example[field] for example in examples]).astype(np.uint8)
            arrays[name] = rows.reshape(len(examples), *(28, 28) * (field == "image"))[published]
            arrays[name].flags.writeable = False
            origin[name] = f"{place}/fashion_mnist, split {split!r}"
    return _verified(arrays, origin)


def _fill_cache(splits: Splits) -> None:
    arrays = (splits.train.images, splits.train.labels, splits.test.images, splits.test.labels)
    try:
        for name, array in zip(DIGESTS, arrays, strict=True):
            write_atomically(cache_dir() / name, _as_idx(array))
    except OSError as error:
        _log.warning("the arrays were not cached, so the next load takes as long: %s", error)


def _from_download(directory: Path | None) -> Splits:
    place = prepare_directory(_tfds_dirs(directory)[0])
    with locked(place):
        # Who prepared it has cached the arrays too, which are read in a fraction of the time.
        if _prepared(place) and (splits := _from_idx(None, (cache_dir(),)) or _from_tfds(place)):
            _log.info("another process has prepared it meanwhile")
            return splits
        if reason := _unreachable(URL):
            raise FileNotFoundError(_advice(f"no Fashion-MNIST here, and {URL} does not answer ({reason})"))
        _log.info("downloading Fashion-MNIST (30 MB) into %s", place)
        _prepare_tfds(place)
        if splits := _from_tfds(place):
            return splits
    raise FileNotFoundError(f"TFDS prepared nothing that can be read in {place}; remove {place}/fashion_mnist")


def _prepare_tfds(place: Path) -> None:
    """Prepare the data set as stock TFDS would, without TensorFlow.

    The stock builder needs TensorFlow to extract gzip and to encode PNG, and waits for ever for a host that falls
    silent; this one does all three itself, and what it writes is read by stock TFDS.
    """
    origin = {name: f"{URL}{name}.gz" for name in DIGESTS}
    fetched = _verified({name: _parsed(_fetched(url), url) for name, url in origin.items()}, origin)

    import PIL.Image
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    stock = tfds.builder_cls("fashion_mnist")
    with registered.skip_registration():

        class FashionMNIST(stock):
            name = "fashion_mnist"

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(batch) for split, batch in fetched._asdict().items()}

            def _generate_examples(self, batch):
                for i, (image, label) in enumerate(zip(*batch, strict=True)):
                    png = io.BytesIO()
                    PIL.Image.fromarray(image).save(png, "PNG")
                    yield i, {"image": png.getvalue(), "label": int(label)}

    with scratch_directory(place) as scratch:
        try:
            builder = FashionMNIST(data_dir=scratch, file_format="array_record")  # pyright: ignore
            builder.download_and_prepare()
        except Exception as error:  # Each layer of TFDS has its own errors for a full disk.
            raise OSError(f"{place}/fashion_mnist: TFDS cannot prepare the data set: {error}") from error
        made = Path(builder.data_dir)
        target = place / "fashion_mnist" / made.name
        target.parent.mkdir(exist_ok=True)
        try:
            made.rename(target)
        except OSError as error:
            raise FileExistsError(f"{target} is there, but cannot be read without TensorFlow; remove it") from error


def _fetched(url: str) -> bytes:
    """Download one file into memory; a host that falls silent or breaks off is an error."""
    deadline = time.monotonic() + DOWNLOAD_SECONDS
    content, total = bytearray(), None
    try:
        with urllib.request.urlopen(url, timeout=STALL_SECONDS) as answer:
            total = answer.headers.get("Content-Length")
            while part := answer.read1(1 << 20):
                content += part
                if time.monotonic() > deadline:
                    raise TimeoutError(f"more than {DOWNLOAD_SECONDS:g} s")
        if total is not None and len(content) != int(total):
            raise ConnectionError("the host broke off")
    except (OSError, ValueError, http.client.HTTPException) as error:
        _close(error)
        reason = f"nothing came for {STALL_SECONDS:g} s" if str(error) == "timed out" else error
        raise ConnectionError(
            f"{url}: the download failed after {len(content):,} of {total or 'unknown'} bytes ({reason}); nothing was "
            "kept, try again"
        ) from error
    return bytes(content)


def _unreachable(url: str) -> str | None:
    """Tell why a host does not answer within `PROBE_SECONDS`, or None if it does."""
    answer = [f"no answer within {PROBE_SECONDS:g} s"]

    def probe():
        try:
            request = urllib.request.Request(f"{url}{next(iter(DIGESTS))}.gz", method="HEAD")
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS):
                answer[0] = ""
        except (OSError, ValueError, http.client.HTTPException) as error:
            _close(error)
            answer[0] = str(getattr(error, "reason", error)) or type(error).__name__

    # A name server that is silent blocks longer than any time-out of a socket, so the wait is bounded from outside.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 0.5)
    return answer[0] or None


def _close(error: Exception) -> None:
    """Let go of the answer that an error of HTTP carries."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()


def _advice(what: str) -> str:
    files = ", ".join(f"{name}.gz" for name in DIGESTS)
    return (
        f"{what}. Any of these helps:\n"
        f"  - put the four files ({files}) into a directory and name it by data_dir or ${DATA_VARIABLE};\n"
        f"  - or put them into {cache_dir()};\n"
        f"  - on Debian or Ubuntu: apt-get install dataset-fashion-mnist;\n"
        f"  - put a data set that TFDS prepared as array_record into {_tfds_dirs(None)[0]};\n"
        f"  - connect to the network and call load(source='download')."
    )


def _report(splits: Splits) -> str:
    lines = []
    for (split, batch), stem in zip(splits._asdict().items(), ("train", "t10k"), strict=True):
        lines.append(f"{split}: {len(batch.labels):,} images of {batch.images.shape[1]}x{batch.images.shape[2]} pixels")
        counts = np.bincount(batch.labels, minlength=len(CLASS_NAMES))
        lines.extend(f"  {count:>6,}  {name}" for name, count in zip(CLASS_NAMES, counts, strict=True))
        lines.extend(f"  SHA-256 {digest}  {name}" for name, digest in DIGESTS.items() if name.startswith(stem))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Fetch the data set and tell what is there; the exit status is 1 if that fails.

    >>> main(["--source", "idx"])  # doctest: +ELLIPSIS
    train: 60,000 images of 28x28 pixels
    ...
    0
    """
    parser = argparse.ArgumentParser(
        prog="python -m fashion_jax.data", description="Fetch Fashion-MNIST and describe it."
    )
    parser.add_argument("--data-dir", help=f"directory to look in first (default: ${DATA_VARIABLE}, if set)")
    parser.add_argument("--source", choices=SOURCES, default="auto", help="where to take it from (default: auto)")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    _log.setLevel(logging.INFO)
    try:
        splits = load(options.data_dir, source=options.source)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; nothing was kept of what was under way, the same command begins it anew", file=sys.stderr)
        return 130
    print(_report(splits))
    return 0


if __name__ == "__main__":
    sys.exit(main())
