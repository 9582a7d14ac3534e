"""A checkpoint comes back as it was saved, or not at all; a run resumes where it belongs, and nowhere else."""

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
from fashion_jax.callbacks import EarlyStopping
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


@pytest.mark.parametrize("every", [1, 3])
def test_a_resumed_run_ends_with_the_same_bytes(data, whole, tmp_path, every):
    ends, run = [], None
    options = OPTIONS | {"epochs": 10, "checkpoint": Checkpoints(tmp_path / "deep" / "run", every=every)}
    for last in (1, 2, 2, 7, 10):
        run = fit(*data, **options, callbacks=[ends.append, lambda end, last=last: end.epoch == last])
    # The last saved epoch is reported again, and what ended a run ends it again.
    assert [end.epoch for end in ends] == [1, 1, 2, 2, *range(2, 8), *range(7, 11)]
    equal(run, whole)
    np.testing.assert_array_equal(ends[-1].history.validation.loss, whole.history.validation.loss)
    equal(fit(*data, **options, callbacks=[ends.append]), whole)
    assert len(ends) == 14
    with pytest.raises(ValueError, match="epochs is 9, and the checkpoint is of epoch 10; ask for as many or more"):
        fit(*data, **options | {"epochs": 9})


def test_a_resumed_sweep_ends_with_the_same_bytes(data, tmp_path):
    """Some of its runs have diverged, and its optimizer's state has a type that NumPy lacks."""
    optimizer = functools.partial(optax.sgd, momentum=0.9, accumulator_dtype=jnp.bfloat16)
    options = {"config": TrainConfig(model=CONFIG.model, optimizer=optimizer), "seeds": [0, 5], "epochs": 4}
    options |= {"learning_rate": (0.01, 1e30)}
    runs = []
    for place, stop in ((None, 4), (tmp_path, 2)):
        with pytest.warns(UserWarning, match="2 of 4 runs diverged in epoch 1"):
            runs.append(sweep(*data, **options, checkpoint=place, callbacks=[lambda end, stop=stop: end.epoch == stop]))
    equal(sweep(*data, **options, checkpoint=str(tmp_path)), runs[0])
    assert "bfloat16" in {leaf.dtype.name for leaf in jax.tree.leaves(runs[0].state.opt_state)}


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
        ({"weight_decay": 0.1}, r"weight_decay is None there and 0\.1 here"),
        ({"key": jax.random.key(2)}, r"key is \[\[0, 1\]\] there and \[\[0, 2\]\] here"),
        ({"start": init_state(KEY, config=CONFIG)}, r"start state is None there and [0-9a-f]{64} here"),
        (config(batch_size=32), "batch_size is 64 there and 32 here"),
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


def test_the_newest_and_the_best_are_kept(data, whole, tmp_path):
    assert whole.best.epoch == 8
    for keep, every, kept in ((1, 1, [8, 10]), (2, 1, [8, 9, 10]), (3, 4, [4, 8, 10])):
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
    equal(fit(*data, **OPTIONS, epochs=10, checkpoint=tmp_path), whole)


def test_runs_in_two_threads_have_a_directory_each(data, whole, tmp_path):
    other = OPTIONS | {"key": jax.random.key(9)}
    train = functools.partial(fit, *data, epochs=10)
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(train, **o, checkpoint=tmp_path / str(i)) for i, o in enumerate((OPTIONS, other))]
    equal(runs[0].result(), whole)
    equal(runs[1].result(), train(**other))
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())


def save(directory: Path, *epochs: int, keep=9) -> None:
    with Store(Checkpoints(directory, keep=keep), identity={"seed": 3}, hints={"model": "MLP"}) as store:
        store.restore(TREE)
        for epoch in epochs:
            store.save(epoch, lambda epoch=epoch: {**TREE, "step": np.int32(epoch)}, best=1, last=True)


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
    assert all(line.startswith(f"{path} ") and "; falling back to the previous checkpoint" in line for line in told)


@pytest.mark.parametrize("damage", [lambda content: content[:-1], lambda content: b"", lambda content: b"x" * 1000])
def test_a_damaged_checkpoint_is_named_and_made_again(data, whole, copy, damage):
    path = copy / "epoch-00002.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match=f"^{path} is damaged.*; falling back to the previous checkpoint"):
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
    with Store(tmp_path, identity={"seed": 3}) as store:
        epoch, tree = store.restore(TREE)
    assert (epoch, int(tree["step"]), tree["weights"].tolist()) == (3, 3, TREE["weights"].tolist())


def test_what_cannot_be_saved_raises(tmp_path):
    with Store(tmp_path, identity={}) as store, pytest.raises(TypeError, match="key"):
        store.save(1, lambda: {"key": jax.random.key(0)}, best=1, last=True)


def test_early_stopping_survives_a_resume(data, tmp_path):
    def run(*callbacks, **options):
        return fit(*data, **OPTIONS, epochs=30, callbacks=[EarlyStopping(patience=2), *callbacks], **options)

    expected = run()
    last = len(expected.history.running_loss)
    assert 3 < last < 30
    run(lambda end: end.epoch == last - 1, checkpoint=tmp_path)
    for _ in range(2):
        equal(run(checkpoint=tmp_path), expected)
