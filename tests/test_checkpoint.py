"""What is saved comes back as it was, or not at all; a run resumes where it belongs, and nowhere else."""

import dataclasses
import functools
import json
import logging
import re
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweep_worker import CONFIG, equal, parts

from fashion_jax import FashionMLP, TrainConfig
from fashion_jax.checkpoint import Checkpoints, Store
from fashion_jax.config import negative_log_likelihood
from fashion_jax.files import DamagedError, load_tensors, save_tensors
from fashion_jax.steps import init_state
from fashion_jax.train import fit, sweep

KEY = jax.random.key(1)
# The validation loss is lowest in the sixth of ten epochs.
OPTIONS = {"key": KEY, "config": CONFIG, "learning_rate": 0.02, "dropout_rate": 0.2}
TREE = {"weights": np.arange(6, dtype=np.float32), "step": np.int32(7), "loss": (np.array([0.5]),)}


@pytest.fixture(scope="module")
def data(small, splits):
    return parts(small, splits)


@pytest.fixture(scope="module")
def whole(data):
    return fit(*data, **OPTIONS, epochs=10)


@pytest.fixture(scope="module")
def saved(data, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("saved") / "räum lich [1]"
    fit(*data, **OPTIONS, epochs=2, checkpoint=directory)
    return directory


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A directory with two epochs of a run."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def epochs_in(directory: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("epoch-")) for path in directory.glob("epoch-*"))


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# A run that resumes


@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_ends_with_the_same_bytes(data, whole, tmp_path, every):
    ends, run = [], None
    options = OPTIONS | {"epochs": 10, "checkpoint": Checkpoints(tmp_path / "deep" / "run", every=every)}
    for _ in range(4):
        run = fit(*data, **options, callbacks=[ends.append, lambda end: end.epoch in (1, 2, 7)])
    assert [end.epoch for end in ends] == list(range(1, 11))
    equal(run, whole)
    equal(fit(*data, **options, callbacks=[ends.append]), whole)
    assert len(ends) == 10
    with pytest.raises(ValueError, match="epochs is 9, and the checkpoint is of epoch 10; ask for as many or more"):
        fit(*data, **options | {"epochs": 9})


def test_a_resumed_sweep_ends_with_the_same_bytes(data, tmp_path):
    """One of its runs has diverged before."""
    options = {"config": CONFIG, "seeds": [0, 5], "learning_rate": (0.01, 1e30), "epochs": 4}
    with pytest.warns(UserWarning, match="2 of 4 runs diverged in epoch 1"):
        expected = sweep(*data, **options)
    with pytest.warns(UserWarning, match="2 of 4 runs diverged in epoch 1"):
        sweep(*data, **options, checkpoint=tmp_path, callbacks=[lambda end: end.epoch == 2])
    equal(sweep(*data, **options, checkpoint=str(tmp_path)), expected)


def test_an_optimizer_s_half_precision_comes_back(data, tmp_path):
    """NumPy has no such type of its own."""
    optimizer = functools.partial(optax.sgd, momentum=0.9, accumulator_dtype=jnp.bfloat16)
    options = {"key": KEY, "config": TrainConfig(model=FashionMLP(hidden=()), optimizer=optimizer)}
    for epochs in (1, 3):
        run = fit(*data, **options, epochs=epochs, checkpoint=tmp_path)
    equal(run, fit(*data, **options, epochs=3))
    assert "bfloat16" in {leaf.dtype.name for leaf in jax.tree.leaves(run.state.opt_state)}


def config(**changes) -> dict:
    return {"config": dataclasses.replace(CONFIG, **changes)}


def test_the_same_run_is_recognized_in_other_words(data, saved, copy, unchecked):
    """With epochs=2 nothing is left to train."""
    expected = fit(*data, **OPTIONS, epochs=2, checkpoint=saved)
    wide = [batch._replace(labels=batch.labels.astype(">i8")) for batch in data]
    equal(fit(*wide, **OPTIONS, epochs=2, checkpoint=copy), expected)
    numbers = {"dropout_rate": np.float32(0.2), "learning_rate": np.float32(0.02)}
    for change in (config(eval_batch_size=7), config(model=FashionMLP(hidden=(16,))), numbers):
        equal(fit(*data, **OPTIONS | change, epochs=2, checkpoint=copy), expected)


def focal(log_probs, labels):
    return negative_log_likelihood(log_probs, labels) ** 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dropout_rate": 0.5}, r"dropout_rate is 0\.2 there and 0\.5 here\. Name"),
        ({"learning_rate": 0.1}, r"learning_rate is 0\.02 there and 0\.1 here\. Name"),
        ({"weight_decay": 0.1}, r"weight_decay is None there and 0\.1 here"),
        ({"key": jax.random.key(2)}, r"key is \[\[0, 1\]\] there and \[\[0, 2\]\] here"),
        ({"start": init_state(KEY, config=CONFIG)}, r"start state is None there and [0-9a-f]{64} here"),
        (config(batch_size=32), "batch_size is 64 there and 32 here"),
        (config(train_eval_size=100), "train_eval_size is 150 there and 100 here"),
        (config(model=FashionMLP(hidden=(8,))), r"model is .*hidden = \(16,\).* there and .*hidden = \(8,\).* here"),
        (config(optimizer=optax.sgd), r"optimizer is optax\.\S*\.adamw there and optax\.\S*\.sgd here"),
        (config(loss=focal), r"loss is \S*negative_log_likelihood there and test_checkpoint\.focal here"),
        (config(augment=lambda key, images: 255 - images), r"augment is None there and test_checkpoint\.<lambda> here"),
        (config(eval_params=lambda opt_state, params: opt_state[0].mu), "eval_params is None there and test_check"),
    ],
)
def test_another_run_s_directory_is_named_with_what_differs(data, copy, change, message):
    before = contents(copy)
    with pytest.raises(ValueError, match=f"^{re.escape(str(copy))} holds the checkpoints of another run: .*{message}"):
        fit(*data, **OPTIONS | change, epochs=3, checkpoint=copy)
    assert contents(copy) == before


def test_other_data_and_other_programs_are_noticed(data, copy):
    labels = data[1].labels.copy()
    labels[17] = (labels[17] + 1) % 10
    with pytest.raises(ValueError, match=r"data is [0-9a-f]{64} there and [0-9a-f]{64} here"):
        fit(data[0], data[1]._replace(labels=labels), **OPTIONS, epochs=3, checkpoint=copy)
    with pytest.raises(ValueError, match=r"seed is None there and \['1'\] here"):
        sweep(*data, config=CONFIG, seeds=[1], learning_rate=0.02, dropout_rate=0.2, checkpoint=copy)
    with jax.default_matmul_precision("bfloat16"), pytest.raises(ValueError, match="run: program is"):
        fit(*data, **OPTIONS, epochs=3, checkpoint=copy)


def test_another_version_of_jax_resumes_within_rounding(data, whole, copy, caplog):
    """It lowers the same program to other text, and what the config looks like has to do."""
    tensors, metadata = load_tensors(copy / "epoch-00002.safetensors")
    for name, change in {"circumstances": {"jax": "0.0.1"}, "identity": {"program": "another text"}}.items():
        metadata[name] = json.dumps(json.loads(metadata[name]) | change)
    save_tensors(copy / "epoch-00002.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=r": batch_size is 64 there and 32 here\. Name"):
        fit(*data, **OPTIONS | config(batch_size=32), epochs=3, checkpoint=copy)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fashion_jax"):
        fit(*data, **OPTIONS | config(eval_batch_size=7), epochs=2, checkpoint=copy)
    assert caplog.messages[0] == f"jax was 0.0.1 and is {jax.__version__}: resuming within rounding, not bit by bit"
    equal(fit(*data, **OPTIONS, epochs=10, checkpoint=copy), whole)


# What stays in the directory


def test_the_newest_and_the_best_are_kept(data, whole, tmp_path):
    assert whole.best.epoch == 6
    for keep, every, kept in ((1, 1, [6, 10]), (2, 1, [6, 9, 10]), (3, 4, [4, 8, 10])):
        place = tmp_path / str(keep)
        fit(*data, **OPTIONS, epochs=10, checkpoint=Checkpoints(place, every=every, keep=keep))
        assert epochs_in(place) == kept
        assert {path.name for path in place.iterdir() if not path.name.startswith("epoch")} == {"lock"}


def test_an_epoch_whose_callback_failed_is_trained_again(data, whole, tmp_path):
    def fail(end):
        if end.epoch == 3:
            raise SystemExit

    with pytest.raises(SystemExit):
        fit(*data, **OPTIONS, epochs=10, checkpoint=tmp_path, callbacks=[fail])
    assert epochs_in(tmp_path) == [1, 2]
    ends = []
    equal(fit(*data, **OPTIONS, epochs=10, checkpoint=tmp_path, callbacks=[ends.append]), whole)
    assert [end.epoch for end in ends] == list(range(3, 11))


def breaking_after(steps):
    optimizer = optax.scale_by_schedule(lambda count: jnp.where(count < steps, -0.1, jnp.nan))
    return TrainConfig(model=FashionMLP(hidden=()), optimizer=lambda: optimizer)


def test_a_run_that_diverges_leaves_its_good_epochs(data, tmp_path):
    options = {"key": KEY, "epochs": 5, "checkpoint": tmp_path}
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="diverged in epoch 3;"):
            fit(*data, **options, config=breaking_after(9))
        assert epochs_in(tmp_path) == [1, 2]
    # A function of the same name that does something else.
    with pytest.raises(ValueError, match=r": program is [0-9a-f]{64} there and [0-9a-f]{64} here\. Name"):
        fit(*data, **options, config=breaking_after(10))


def test_runs_in_two_threads_have_a_directory_each(data, whole, tmp_path):
    other = OPTIONS | {"key": jax.random.key(9)}
    train = functools.partial(fit, *data, epochs=10)
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(train, **o, checkpoint=tmp_path / str(i)) for i, o in enumerate((OPTIONS, other))]
    equal(runs[0].result(), whole)
    equal(runs[1].result(), train(**other))
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())


# Damage


def save(directory: Path, *epochs: int, keep=9) -> None:
    with Store(Checkpoints(directory, keep=keep), identity={"seed": 3}, hints={"model": "MLP"}) as store:
        store.restore(TREE)
        for epoch in epochs:
            store.save(epoch, lambda epoch=epoch: {**TREE, "step": np.int32(epoch)}, best=1, last=True)


def restored(directory: Path) -> int:
    with Store(directory, identity={"seed": 3}) as store:
        epoch, tree = store.restore(TREE)
    np.testing.assert_array_equal(tree["weights"], TREE["weights"])
    assert tree["step"] == epoch
    return epoch


def test_every_flipped_bit_is_noticed_and_the_checkpoint_before_is_used(tmp_path, unchecked):
    """Each bit of the header, which holds the metadata, and of the arrays."""
    save(tmp_path, 4, 5)
    path = tmp_path / "epoch-00005.safetensors"
    content = path.read_bytes()
    with Store(tmp_path, identity={"seed": 3}) as store, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert (store.restore(TREE)[0], len(caught)) == (5, 0)
        for place in range(8 * len(content)):
            damaged = bytearray(content)
            damaged[place // 8] ^= 1 << place % 8
            path.write_bytes(damaged)
            epoch, tree = store.restore(TREE)
            assert (epoch, int(tree["step"]), len(caught)) == (4, 4, place + 1)
    told = [str(warning.message) for warning in caught]
    assert all(line.startswith(f"{path} ") and "; the checkpoint before it is used" in line for line in told)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"x" * 1000])
def test_a_damaged_checkpoint_is_named_and_made_again(data, whole, copy, damage):
    path = copy / "epoch-00002.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"^{path} is damaged.*; the checkpoint before it is used"):
        equal(fit(*data, **OPTIONS, epochs=10, checkpoint=copy), whole)


def test_when_all_are_damaged_nothing_is_made_up(data, copy):
    for path in copy.glob("epoch-*"):
        path.write_bytes(path.read_bytes()[::-1])
    before = contents(copy)
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(DamagedError, match=f"every checkpoint in {copy}"):
        fit(*data, **OPTIONS, epochs=3, checkpoint=copy)
    assert contents(copy) == before


def test_damaged_checkpoints_push_no_good_one_out(tmp_path):
    save(tmp_path, 1, 8, 9)
    for epoch in (8, 9):
        (tmp_path / f"epoch-0000{epoch}.safetensors").write_bytes(b"")
    with pytest.warns(UserWarning, match="is damaged"):
        save(tmp_path, 2, 3, keep=1)
    assert restored(tmp_path) == 3


def test_what_cannot_be_saved_raises(tmp_path):
    with Store(tmp_path, identity={}) as store, pytest.raises(TypeError, match="key"):
        store.save(1, lambda: {"key": jax.random.key(0)}, best=1, last=True)
