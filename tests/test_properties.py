"""Properties that hold for every size: the data reader, the parts of a data set, the masked batches."""

import gzip
import tempfile
from pathlib import Path

import hypothesis.extra.numpy as arrays
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sources import idx_bytes

from fashion_jax import Batch, TrainConfig, data
from fashion_jax.train import evaluate, init_state, split_key, train_epoch, train_step

# The same examples in every run, and no clock.
SETTINGS = settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
KEY = jax.random.key(0)
SMALL = TrainConfig(hidden=(8,))


@SETTINGS
@given(
    array=arrays.arrays(np.uint8, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)),
    compressed=st.booleans(),
)
def test_an_idx_file_is_read_as_it_was_written(array, compressed):
    content = idx_bytes(array)
    assert data._as_idx(array) == content
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "file"
        path.write_bytes(gzip.compress(content) if compressed else content)
        read = data.read_idx(path)
    assert read.shape == array.shape
    assert read.dtype == np.uint8
    assert not read.flags.writeable
    np.testing.assert_array_equal(read, array)


@st.composite
def numbered(draw) -> Batch:
    """Examples that carry their own number, with any labels."""
    labels = np.array(draw(st.lists(st.integers(0, 9), min_size=2, max_size=60)), np.int32)
    images = np.zeros((len(labels), 28, 28), np.uint8)
    images[:, 0, 0] = np.arange(len(labels))
    return Batch(images, labels)


def members(part: Batch) -> list[int]:
    return part.images[:, 0, 0].tolist()


def assert_stratified(part: Batch, whole: Batch):
    share = len(part.labels) / len(whole.labels)
    counts, of = (np.bincount(batch.labels, minlength=10) for batch in (part, whole))
    assert abs(counts - share * of).max() <= 1


# Each length compiles a permutation of its own.
@settings(SETTINGS, max_examples=40)
@given(batch=numbered(), fraction=st.floats(0.05, 0.95), seed=st.integers(0, 2**32 - 1))
def test_a_hold_out_is_a_stratified_partition_that_the_key_decides(batch, fraction, seed):
    n = len(batch.labels)
    size = round(fraction * n)
    if not 0 < size < n:
        return
    rest, held_out = data.hold_out(batch, fraction, key=jax.random.key(seed))
    assert len(held_out.labels) == size
    assert members(rest) == sorted(members(rest))
    assert members(held_out) == sorted(members(held_out))
    assert sorted(members(rest) + members(held_out)) == list(range(n))
    for part in (rest, held_out):
        np.testing.assert_array_equal(part.labels, batch.labels[members(part)])
        assert_stratified(part, batch)
    again = data.hold_out(batch, fraction, key=jax.random.key(seed))
    assert [members(part) for part in again] == [members(rest), members(held_out)]
    assert members(data.subset(batch, size, key=jax.random.key(seed))) == members(held_out)


def random_batch(n: int, seed: int) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(rng.integers(256, size=(n, 28, 28), dtype=np.uint8), rng.integers(10, size=n, dtype=np.int32))


def losses(expected: np.ndarray, batch: Batch) -> np.ndarray:
    return -expected[np.arange(len(batch.labels)), batch.labels]


def log_probs(params, images) -> np.ndarray:
    """The network in float64 NumPy."""
    x = ((np.asarray(images, np.float64) / 255 - 0.5) / 0.5).reshape(len(images), -1)
    for i in range(1, len(params) + 1):
        x = x @ np.asarray(params[f"fc{i}"]["kernel"], np.float64) + np.asarray(params[f"fc{i}"]["bias"], np.float64)
        x = np.maximum(x, 0) if i < len(params) else x
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


@settings(SETTINGS, max_examples=12)
@given(n=st.integers(1, 40), size=st.integers(1, 50), seed=st.integers(0, 100))
def test_an_evaluation_in_chunks_is_numpy_s_whatever_the_sizes(n, size, seed):
    config = TrainConfig(hidden=(8,), eval_batch_size=size)
    params = init_state(jax.random.key(seed), config=SMALL).params
    batch = random_batch(n, seed)
    expected = log_probs(params, batch.images)
    metrics = evaluate(params, batch, config=config)
    np.testing.assert_allclose(metrics.loss, losses(expected, batch).mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics.accuracy, (expected.argmax(axis=1) == batch.labels).mean(), rtol=1e-6)


@SETTINGS
@given(n=st.integers(1, 16), seed=st.integers(0, 100), other=st.integers(0, 100))
def test_padding_counts_for_nothing_in_a_step(n, seed, other):
    """One program: batches of 16, the first n of them real."""
    state = init_state(jax.random.key(seed), config=SMALL)
    real, padding = random_batch(16, seed), random_batch(16, other + 1000)
    weights = jnp.array(np.arange(16) < n, jnp.float32)
    results = [
        train_step(state, batch, KEY, config=SMALL, dropout_rate=0.2, weights=weights)
        for batch in (real, Batch(*(np.concatenate([a[:n], b[n:]]) for a, b in zip(real, padding, strict=True))))
    ]
    jax.tree.map(np.testing.assert_array_equal, *results)
    _, metrics = train_step(state, real, KEY, config=SMALL, dropout_rate=0.0, weights=weights)
    expected = log_probs(state.params, real.images)
    np.testing.assert_allclose(metrics.loss, losses(expected, real)[:n].mean(), rtol=1e-5)
    np.testing.assert_allclose(
        metrics.accuracy, (expected.argmax(axis=1) == real.labels)[:n].mean(), rtol=1e-6, atol=1e-6
    )


# Every pair of a size and a batch size is a program.
@settings(SETTINGS, max_examples=6)
@given(n=st.sampled_from([1, 2, 13, 40]), size=st.sampled_from([1, 7, 13, 64]), seed=st.integers(0, 100))
def test_an_epoch_counts_every_example_once_whatever_the_sizes(n, size, seed):
    """The weights hardly move, so that the mean of the batch losses is known beforehand."""
    config = TrainConfig(hidden=(8,), batch_size=size, learning_rate=1e-12)
    key, batch = jax.random.key(seed), random_batch(n, seed)
    start = init_state(key, config=SMALL)
    state, batch_losses = train_epoch(start, batch, key, config=config, dropout_rate=0.0)
    bits = jax.random.bits(jax.random.fold_in(split_key(key).order, 0), (n,))
    order = np.argsort(np.asarray(bits), kind="stable")
    each = losses(log_probs(start.params, batch.images), batch)[order]
    expected = [each[first : first + size].mean() for first in range(0, n, size)]
    np.testing.assert_allclose(batch_losses, expected, rtol=1e-5)
    assert int(state.step) == -(-n // size)
