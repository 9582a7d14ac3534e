"""A checkpoint comes back as it was saved, or not at all; a run resumes where it belongs, and nowhere else."""

import dataclasses
import functools
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sweep_worker import CONFIG, LINEAR, equal

from fashion_jax import FashionMLP, TrainConfig
from fashion_jax.checkpoint import Checkpoints, Store
from fashion_jax.config import negative_log_likelihood
from fashion_jax.files import DamagedError, load_tensors, save_tensors
from fashion_jax.steps import init_state
from fashion_jax.train import fit, sweep

KEY = jax.random.key(1)
OPTIONS = {"key": KEY, "config": CONFIG, "learning_rate": 0.02, "dropout_rate": 0.2}


@pytest.fixture(scope="module")
def whole(data):
    return fit(*data, **OPTIONS, epochs=10)


@pytest.fixture
def saved(data, tmp_path) -> Path:
    """A directory with two epochs of a run."""
    directory = tmp_path / "räum lich [1]"
    fit(*data, **OPTIONS, epochs=2, checkpoint=directory)
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_a_resumed_run_ends_with_the_same_bytes(data, whole, tmp_path):
    ends, run = [], None
    options = OPTIONS | {"epochs": 10, "checkpoint": Checkpoints(tmp_path / "deep" / "run", every=3)}
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
    options = {"config": TrainConfig(model=LINEAR.model, optimizer=optimizer), "seeds": [0, 5], "epochs": 4}
    options |= {"learning_rate": (0.01, 1e38)}
    runs = []
    for place, stop in ((None, 4), (tmp_path, 2)):
        with pytest.warns(UserWarning, match="2 of 4 runs diverged in epoch 1"):
            runs.append(sweep(*data, **options, checkpoint=place, callbacks=[lambda end, stop=stop: end.epoch == stop]))
    equal(sweep(*data, **options, checkpoint=str(tmp_path)), runs[0])
    with pytest.raises(ValueError, match=r"learning_rate is \['0\.01', '1e\+38'\] there and \['0\.01', '0\.5'\] here"):
        sweep(*data, **options | {"learning_rate": (0.01, 0.5)}, checkpoint=tmp_path)
    assert "bfloat16" in {leaf.dtype.name for leaf in jax.tree.leaves(runs[0].state.opt_state)}


def config(**changes) -> dict:
    return {"config": dataclasses.replace(CONFIG, **changes)}


def test_the_same_run_is_recognized_in_other_words(data, saved, unchecked):
    """With epochs=2 nothing is left to train."""
    expected = fit(*data, **OPTIONS, epochs=2)
    wide = [batch._replace(labels=batch.labels.astype(">i8")) for batch in data]
    equal(fit(*wide, **OPTIONS, epochs=2, checkpoint=saved), expected)
    numbers = {"dropout_rate": np.float32(0.2), "learning_rate": np.float32(0.02)}
    for change in (config(eval_batch_size=7), config(model=FashionMLP(hidden=(16,))), numbers):
        equal(fit(*data, **OPTIONS | change, epochs=2, checkpoint=saved), expected)


def focal(log_probs, labels):
    return negative_log_likelihood(log_probs, labels) ** 2


def test_another_run_s_directory_is_named_with_what_differs(data, saved):
    def told(*differences):
        message = f"{re.escape(str(saved))} holds the checkpoints of another run: .*{'; '.join(differences)}"
        return pytest.raises(ValueError, match=rf"^{message}\. Name another")

    before, labels, digests = contents(saved), data[1].labels.copy(), "[0-9a-f]{64} there and [0-9a-f]{64} here"
    train = functools.partial(fit, *data, **OPTIONS, epochs=3, checkpoint=saved)
    with told(
        r"dropout_rate is 0\.2 there and 0\.5 here",
        r"key is \[\[0, 1\]\] there and \[\[0, 2\]\] here",
        "start state is None there and [0-9a-f]{64} here",
        r".*weight_decay is None there and 0\.1 here",
    ):
        train(dropout_rate=0.5, weight_decay=0.1, key=jax.random.key(2), start=init_state(KEY, config=CONFIG))
    with told("batch_size is 64 there and 32 here"):
        train(**config(batch_size=32))
    with told(
        r"model is .*hidden = \(16,\).* there and .*hidden = \(8,\).* here",
        r"optimizer is optax\.\S*\.adamw there and optax\.\S*\.sgd here",
        r"loss is \S*negative_log_likelihood there and test_checkpoint\.focal here",
        r"augment is None there and test_checkpoint\.\S*<lambda> here",
        r"eval_params is None there and test_checkpoint\.\S*<lambda> here",
    ):
        functions = {"eval_params": lambda opt_state, params: params, "augment": lambda key, images: 255 - images}
        train(**config(model=FashionMLP(hidden=(8,)), optimizer=optax.sgd, loss=focal, **functions))
    labels[17] = (labels[17] + 1) % 10
    with told(f"data is {digests}"):
        fit(data[0], data[1]._replace(labels=labels), **OPTIONS, epochs=3, checkpoint=saved)
    with jax.default_matmul_precision("bfloat16"), told(f"program is {digests}"):
        train()
    assert contents(saved) == before


def test_another_version_of_jax_resumes_within_rounding(data, whole, saved, caplog):
    """It lowers the same program to other text, and what the config looks like has to do."""
    tensors, metadata = load_tensors(saved / "epoch-00002.safetensors")
    for name, change in {"circumstances": {"jax": "0.0.1"}, "identity": {"program": "another text"}}.items():
        metadata[name] = json.dumps(json.loads(metadata[name]) | change)
    save_tensors(saved / "epoch-00002.safetensors", tensors, metadata)
    with pytest.raises(ValueError, match=r": batch_size is 64 there and 32 here\. Name"):
        fit(*data, **OPTIONS | config(batch_size=32), epochs=3, checkpoint=saved)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fashion_jax"):
        fit(*data, **OPTIONS | config(eval_batch_size=7), epochs=2, checkpoint=saved)
    assert caplog.messages[0] == f"jax was 0.0.1 and is {jax.__version__}: resuming within rounding, not bit by bit"
    equal(fit(*data, **OPTIONS, epochs=10, checkpoint=saved), whole)


def test_the_newest_and_the_best_are_kept(data, whole, tmp_path):
    assert whole.best.epoch == 8
    for keep, every, kept in ((1, 1, [8, 10]), (2, 1, [8, 9, 10]), (3, 4, [4, 8, 10])):
        place = tmp_path / str(keep)
        fit(*data, **OPTIONS, epochs=10, checkpoint=Checkpoints(place, every=every, keep=keep))
        assert sorted(place.glob("epoch-*")) == [place / f"epoch-{epoch:05}.safetensors" for epoch in kept]
        assert {path.name for path in place.iterdir() if not path.name.startswith("epoch")} == {"lock"}


def test_an_epoch_whose_callback_failed_is_trained_again(data, whole, tmp_path):
    def fail(end):
        if end.epoch == 3:
            raise SystemExit

    with pytest.raises(SystemExit):
        fit(*data, **OPTIONS, epochs=10, checkpoint=tmp_path, callbacks=[fail])
    assert sorted(path.name[:11] for path in tmp_path.glob("epoch-*")) == ["epoch-00001", "epoch-00002"]
    equal(fit(*data, **OPTIONS, epochs=10, checkpoint=tmp_path), whole)


def test_runs_in_two_threads_do_not_wait_for_each_other(data, whole, tmp_path):
    with ThreadPoolExecutor(2) as threads:
        runs = [threads.submit(fit, *data, **OPTIONS, epochs=10, checkpoint=tmp_path / name) for name in "ab"]
    for run in runs:
        equal(run.result(), whole)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content[:-1] + bytes([content[-1] ^ 1]),
        # One bit makes of the digest's name another name.
        lambda content: content.replace(b"sha256", b"sha257"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_made_again(data, whole, saved, damage):
    path = saved / "epoch-00002.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    told = f"^{re.escape(str(path))} (is damaged|has no digest).*; falling back to the previous checkpoint"
    with pytest.warns(UserWarning, match=told):
        equal(fit(*data, **OPTIONS, epochs=10, checkpoint=saved), whole)


def test_when_all_are_damaged_nothing_is_made_up(data, saved):
    for path in saved.glob("epoch-*"):
        path.write_bytes(path.read_bytes()[::-1])
    before = contents(saved)
    every = re.escape(f"every checkpoint in {saved} is damaged")
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(DamagedError, match=every):
        fit(*data, **OPTIONS, epochs=3, checkpoint=saved)
    assert contents(saved) == before


def test_damaged_checkpoints_push_no_good_one_out(tmp_path):
    def save(*epochs, keep):
        with Store(Checkpoints(tmp_path, keep=keep), identity={}) as store:
            for epoch in epochs:
                store.save(epoch, lambda epoch=epoch: {"step": np.int32(epoch)}, best=1, last=True)

    save(1, 8, 9, keep=3)
    for epoch in (8, 9):
        (tmp_path / f"epoch-0000{epoch}.safetensors").write_bytes(b"")
    save(2, 3, keep=1)
    with Store(tmp_path, identity={}) as store:
        assert store.restore({"step": 0}) == (3, {"step": 3})


def test_what_cannot_be_saved_raises(tmp_path):
    with Store(tmp_path, identity={}) as store, pytest.raises(TypeError, match="key"):
        store.save(1, lambda: {"key": jax.random.key(0)}, best=1, last=True)
