"""Data sets as NumPy arrays, and random parts of them; `python -m fashion_jax.data` fetches one."""

import argparse
import logging
import os
import sys

import jax
import numpy as np
from jaxtyping import Array, Key

from fashion_jax import _checks, sources
from fashion_jax.catalog import DATA_SETS, FILES
from fashion_jax.types import Batch, Splits

CLASS_NAMES: tuple[str, ...] = DATA_SETS["fashion_mnist"].class_names
SOURCES = ("auto", "idx", "tfds", "download")

_log = logging.getLogger("fashion_jax.data")  # `python -m` calls this module __main__.


def load(
    name: str = "fashion_mnist", *, data_dir: str | os.PathLike[str] | None = None, source: str = "auto"
) -> Splits:
    """Load a data set from the first source that has it, verified, in the published order.

    - "idx": the four IDX files, gzipped or not, in `data_dir` (also as torchvision and Kaggle lay them out, or in a
      directory `name` inside), in the user's cache, or where Debian's package dataset-fashion-mnist puts them.
    - "tfds": a data set prepared by TFDS as array_record, in `data_dir`, $TFDS_DATA_DIR or ~/tensorflow_datasets.
    - "download": the files are fetched into the cache, and prepared as a TFDS data set without TensorFlow.
    - "auto": the first of these that has the data.

    Of KMNIST's training images only the gzipped file has a known digest: an uncompressed copy is checked by its shape.

    Args:
        name: "fashion_mnist", "mnist" or "kmnist"; `DATA_SETS[name]` has its class names.
        data_dir: Directory to look in first; by default the one in $FASHION_JAX_DATA, if set.
        source: One of `SOURCES`.

    Returns:
        60,000 training and 10,000 test examples, as read-only NumPy arrays.

    Raises:
        TypeError: `name` is not a string.
        ValueError: A file in `data_dir` does not hold what was published, or `name` or `source` is unknown.
        OSError: `data_dir` does not exist or lacks one of the four files, or no source has the data.

    >>> train, test = load()
    >>> train.images.shape, test.labels.shape
    ((60000, 28, 28), (10000,))
    """
    if not isinstance(name, str) or name not in DATA_SETS:
        error = ValueError if isinstance(name, str) else TypeError
        names = ", ".join(DATA_SETS)
        raise error(f"name must be one of {names}, got {_checks.got(name)}; pass a directory as data_dir=")
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}; got {source!r}")
    data_set = DATA_SETS[name]
    named = data_dir or os.environ.get("FASHION_JAX_DATA")
    named = _checks.path("data_dir", named) if named else None
    if named and not named.is_dir() and source != "download":
        raise FileNotFoundError(
            f"data_dir, or $FASHION_JAX_DATA, is not a directory: {named}; leave it out for the data that "
            f"`python -m fashion_jax.data --name {name}` fetches"
        )
    looked = []
    for read, place in sources.candidates(data_set, source, named):
        try:
            if splits := read(place):
                _log.info("%s from %s", data_set.title, place)
                return splits
        except (OSError, ValueError) as error:
            if place == named:
                raise
            _log.warning("passing over %s", error)
        looked.append(f"{place} (which holds {sources.contents(place)})" if place == named else str(place))
    try:
        if source in ("auto", "download"):
            return sources.download(data_set, named)
    except ConnectionError as error:
        looked.append(str(error))
    debian = ", or install Debian's package dataset-fashion-mnist, which `make data` does without root"
    raise FileNotFoundError(
        f"no {data_set.title} in {', '.join(dict.fromkeys(looked))}; put {', '.join(FILES)} into a directory "
        f"and name it by data_dir or $FASHION_JAX_DATA{debian if name == 'fashion_mnist' else ''}"
    )


def hold_out(batch: Batch, fraction: float, *, key: Key[Array, ""]) -> tuple[Batch, Batch]:
    """Split off a random part with the same share of each class.

    Args:
        batch: n examples.
        fraction: Share of the examples to hold out, in (0, 1).
        key: Determines which.

    Returns:
        The rest, and the round(fraction * n) examples held out, both in the order of `batch`.

    >>> batch = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100) % 10)
    >>> rest, held_out = hold_out(batch, 0.2, key=jax.random.key(0))
    >>> len(rest.labels), np.bincount(held_out.labels).tolist()
    (80, [2, 2, 2, 2, 2, 2, 2, 2, 2, 2])
    """
    images, labels = _checks.batch("batch", batch)
    size = round(_checks.number("fraction", fraction) * len(labels))
    if not 0 < size < len(labels):
        raise ValueError(f"fraction must leave examples in both parts, got {fraction} of {len(labels)} examples")
    order = _stratified_order(labels, _checks.key(key))
    rest, held_out = np.sort(order[size:]), np.sort(order[:size])
    return Batch(images[rest], labels[rest]), Batch(images[held_out], labels[held_out])


def subset(batch: Batch, size: int, *, key: Key[Array, ""]) -> Batch:
    """Choose a random part with the same share of each class; the parts of one key are nested.

    Args:
        batch: n examples.
        size: Number of examples to choose, 1 to n.
        key: Determines which.

    Returns:
        `size` examples, in the order of `batch`.

    >>> batch = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100) % 10)
    >>> np.bincount(subset(batch, 30, key=jax.random.key(0)).labels).tolist()
    [3, 3, 3, 3, 3, 3, 3, 3, 3, 3]
    """
    images, labels = _checks.batch("batch", batch)
    if _checks.integer("size", size, 1) > len(labels):
        raise ValueError(f"size must be at most {len(labels)}, the number of examples, got {size}")
    chosen = np.sort(_stratified_order(labels, _checks.key(key))[:size])
    return Batch(images[chosen], labels[chosen])


def main(argv: list[str] | None = None) -> int:
    """Fetch the data set, describe it, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fashion_jax.data", description="Fetch a data set and describe it.")
    parser.add_argument("--name", choices=DATA_SETS, default="fashion_mnist", help="data set (default: fashion_mnist)")
    parser.add_argument("--data-dir", help="directory to look in first (default: $FASHION_JAX_DATA, if set)")
    parser.add_argument("--source", choices=SOURCES, default="auto", help="where to take it from (default: auto)")
    options = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fashion_jax").setLevel(logging.INFO)
    try:
        train, test = load(options.name, data_dir=options.data_dir, source=options.source)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    title = DATA_SETS[options.name].title
    print(f"{title}: {len(train.labels):,} training images and {len(test.labels):,} test images")
    return 0


def _stratified_order(labels, key):
    """Order examples at random so that every prefix holds each class in proportion."""
    # NumPy's generator: to compile JAX's would take longer than to draw.
    permutation = np.random.default_rng(np.asarray(jax.random.key_data(key))).permutation(len(labels))
    _, shuffled, counts = np.unique(labels[permutation], return_inverse=True, return_counts=True)
    by_class = np.argsort(shuffled, kind="stable")
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(counts.cumsum() - counts, counts)
    return permutation[np.lexsort((shuffled, (rank + 0.5) / counts[shuffled]))]


if __name__ == "__main__":
    sys.exit(main())
