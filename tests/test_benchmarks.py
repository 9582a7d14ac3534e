"""The benchmarks measure what they say: turns, summaries, counts of operations, PyTorch's loops, complete records."""

import collections
import importlib
import json
import re
import subprocess
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import tyro

from benchmarks import __main__ as all_benchmarks
from benchmarks import ablation, compare, fuzz, harness, lanes, roofline, tables, throughput
from benchmarks.kernels import count
from benchmarks.reference import FastLoop, GraphLoop, TutorialLoop
from fashion_jax import Batch, TrainConfig, files
from fashion_jax.interop import from_torch
from fashion_jax.train import Carry, Data, evaluate, init_state, train_step
from fashion_jax.types import Best

KEY = jax.random.key(0)
LISTING = (Path(__file__).parent / "reference" / "gpu_launches.txt").read_text()


def test_programs_take_turns_after_one_run_of_each():
    order = []
    seconds = harness.alternate({name: lambda name=name: order.append(name) for name in "abc"}, 2)
    assert "".join(order) == "abcabcabc"
    assert [len(runs) for runs in seconds.values()] == [2, 2, 2]


def test_timings_are_summarized_and_kept():
    row = harness.spread([1.0, 9.0, 2.0])
    assert (row["median (s)"], row["min (s)"], row["max (s)"], row["quartiles (s)"]) == (2.0, 1.0, 9.0, [1.5, 5.5])
    assert row["seconds"] == [1.0, 9.0, 2.0]
    # Pair by pair 1, 3 and 1; of the medians it would be 4/3.
    assert harness.ratio([2.0, 9.0, 4.0], [2.0, 3.0, 4.0]) == 1.0
    rows = harness.table([{"program": "fit", "s": 1.23456, "seconds": [1]}, {"program": "sweep", "n": [3, 4.0]}])
    assert [line.replace(" ", "") for line in rows.splitlines()[2:]] == ["|fit|1.235||", "|sweep||3-4|"]


def test_a_record_says_what_figures_depend_on_and_is_read_back(tmp_path, monkeypatch):
    rows = [{"program": name, **harness.spread([1.0, 3.0])} for name in ("fit, without", "fit, with")]
    folder = tmp_path / "2026-11-28-amd-epyc-2-cores"
    harness.write("saving", rows, flags=harness.TimedFlags(output=folder, repetitions=2), note=1)
    record = json.loads((folder / "saving.json").read_text())
    assert (record["rows"], record["flags"], record["note"]) == (rows, {"repetitions": 2}, 1)
    assert record["environment"].items() >= harness.commit().items()
    assert {"processor", "processor_model", "processor_flags", "threads"} <= record["environment"].keys()
    assert {"jax", "torch", "python"} <= record["environment"]["versions"].keys()
    monkeypatch.setattr(tables, "RECORDS", tmp_path)
    assert tables.rows_of("saving") == rows
    assert "2.00 (1.00-3.00)" in tables.TABLES["saving"]()


def test_records_are_compared_row_by_row(tmp_path, capsys):
    folders = tmp_path / "old", tmp_path / "new"
    for folder, seconds, seed in zip(folders, (2.0, 0.5), (0, 1), strict=True):
        record = {"rows": [{"images": 1, "program": "predict", "median (s)": seconds}], "flags": {"seed": seed}}
        files.write(folder / "predict.json", json.dumps(record | {"environment": {"processor": "one"}}))
    compare.main(compare.Flags(*folders))
    out, err = capsys.readouterr()
    assert out.splitlines()[2].replace(" ", "") == "|predict|1,predict|2|0.5|4|"
    assert err == "predict.json: --seed was 0 and is 1\n"
    files.write(folders[1] / "predict.json", "{}")
    with pytest.raises(ValueError, match=r"predict\.json is no benchmark's record"):
        compare.main(compare.Flags(*folders))


def test_changes_of_the_code_make_a_tree_unclean_and_records_do_not(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    commit = harness.commit.__wrapped__
    assert commit() == {"commit": None, "clean": None}
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c")
    for words in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "--message", "first"]):
        subprocess.run([*git, *words], check=True)
    first = commit()
    for file, clean in (("benchmarks/records/a.json", True), ("benchmarks/code.py", False)):
        files.write(tmp_path / file, "")
        assert commit() == {**first, "clean": clean}


def test_counts_out_of_range_are_errors():
    for flags in (throughput.Flags(batch_sizes=(64, 0)), throughput.Flags(repetitions=0), fuzz.Flags(seed=-1)):
        with pytest.raises(ValueError, match=r"--(batch-sizes|repetitions|seed) must be at least \d, got (0|-1)"):
            harness.check(flags)


def test_a_set_of_benchmarks_stops_at_one_that_fails(tmp_path, capfd, monkeypatch):
    for names in all_benchmarks.SETS.values():
        for name, flags in names.items():
            flags_of = importlib.import_module(f"benchmarks.{name}").Flags
            tyro.cli(flags_of, args=[*flags, "--data-dir", "x", "--output", "y"])
    monkeypatch.setitem(all_benchmarks.SETS, "cpu", {"fuzz": ("--cases", "0"), "lanes": ()})
    monkeypatch.setattr(all_benchmarks.signal, "signal", lambda *_: None)
    assert all_benchmarks.main(all_benchmarks.Flags(output=tmp_path)) == 1
    assert "error: --cases must be at least 1, got 0\nfuzz failed; not run: lanes (each" in capfd.readouterr().err


@pytest.fixture
def few(small) -> Data:
    return Data(*(Batch(small.images[:n], small.labels[:n]) for n in (50, 30, 40)))


def test_a_turn_is_an_epoch_and_its_evaluations(few):
    config, evaluated = TrainConfig(batch_size=20), []
    loop = FastLoop(few.train, dropout_rate=0.2, batch_size=20)
    steps, fit, by_torch = throughput.JaxSteps(config, few), throughput.JaxFit(config, few), throughput.Torch(loop, few)
    loop.evaluate = lambda batches: evaluated.append(sum(len(labels) for _, labels in batches))
    for runs in harness.take_turns({"steps": steps.turn, "fit": fit.turn, "torch": by_torch.turn}, 2).values():
        assert 0 < runs[1].loss < runs[0].loss
        assert all(turn.training > 0 and turn.both > 0 for turn in runs)
    assert (int(steps.state.step), int(fit.state.step)) == (6, 6)
    assert {int(state["step"]) for state in loop.optimizer.state.values()} == {6}
    assert evaluated == [30, 40] * 2


def test_the_loop_of_jitted_steps_takes_every_row_once_with_masks_of_its_own(few):
    config = TrainConfig(batch_size=20)
    program, state = throughput.JaxSteps(config, few), init_state(KEY, config=config)
    _, order_key, dropout_key = jax.random.split(KEY, 3)
    order, losses = jax.random.permutation(order_key, 50), []
    for step, rows in enumerate((order[:20], order[20:40], order[40:])):
        batch = Batch(few.train.images[rows], few.train.labels[rows])
        key = jax.random.fold_in(dropout_key, step)
        state, metrics = train_step(state, batch, key, config=config, dropout_rate=throughput.RATE)
        losses.append(metrics.loss)
    assert program.turn().loss == pytest.approx(np.mean(losses), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), program.state.params, state.params)


def test_operations_are_those_of_an_epoch():
    # Two products of [n, 3] x [3, 2] and [n, 2] x [2, 1] forward, two for the weights, one for the hidden layer.
    assert roofline.flop_of_an_epoch(5, (3, 2, 1)) == [2 * 5 * (6 + 6), 2 * 5 * (2 + 2 + 2)]
    weight, x, delta = np.full((3, 2), 0.01), np.ones((4, 3)), np.ones((4, 2))
    x, delta, (output, gradient, back) = roofline.layer_products(weight, x, delta, steps=5, first=False)
    for ours, expected in ((output, x @ weight), (gradient, x.T @ delta), (back, delta @ weight.T)):
        np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert len(roofline.layer_products(weight, x, delta, steps=5, first=True)[2]) == 2


def test_an_ablation_takes_its_device_out(few):
    """Else a program would be compared with itself."""
    numbers = {"dropout_rate": 0.2, "learning_rate": 0.003}
    state, data = init_state(KEY, **numbers), jax.tree.map(jnp.asarray, few)
    carry = Carry(state, Best(state.params, jnp.array(jnp.inf), jnp.array(0)))

    def lowered(replacements, config):
        with harness.replaced(*replacements):
            return jax.jit(partial(ablation.one, config=config)).lower(KEY, carry, numbers, data).as_text()

    texts = [lowered([], TrainConfig()), *(lowered(*without) for without in ablation.WITHOUT.values())]
    assert len(set(texts)) == 1 + len(ablation.WITHOUT)


@pytest.mark.parametrize("kind", [TutorialLoop, FastLoop, GraphLoop])
def test_pytorch_s_loops_are_the_experiment(small, few, kind):
    """One batch an epoch, so that its order does not matter."""
    if kind is GraphLoop and not torch.cuda.is_available():
        pytest.skip("a CUDA graph needs a GPU")
    loop = kind(few.train, dropout_rate=0.0, batch_size=50, device="cuda" if kind is GraphLoop else "cpu")
    weights = {name: leaf.cpu() for name, leaf in loop.model.state_dict().items()}
    state = init_state(KEY)._replace(params=from_torch(weights))
    for _ in range(4):
        state, metrics = train_step(state, few.train, KEY)
        assert loop.epoch() == pytest.approx(float(metrics.loss), rel=1e-4)
    np.testing.assert_allclose(loop.evaluate(loop.prepare(small)), evaluate(state.params, small), rtol=1e-3)


@pytest.mark.parametrize("kind", [TutorialLoop, FastLoop])
def test_pytorch_s_loops_shuffle_and_drop_units_while_they_train_only(few, kind):
    loop = kind(few.train, dropout_rate=0.5, batch_size=20)
    batches, seen = loop.prepare(few.train), []
    assert loop.evaluate(batches) == loop.evaluate(batches)
    loop.model.register_forward_pre_hook(lambda module, x: seen.append((module.training, x[0].flatten(1).sum(dim=1))))
    for _ in range(2):
        loop.epoch()
    assert [(training, len(rows)) for training, rows in seen] == [(True, n) for n in (20, 20, 10)] * 2
    first, second = (torch.cat([rows for _, rows in half]) for half in (seen[:3], seen[3:]))
    assert not torch.equal(first, second)
    np.testing.assert_allclose(first.sort().values, second.sort().values)


def test_a_process_on_each_core_trains_a_model_of_its_own(splits):
    losses = lanes.OnEachCore().epoch()
    assert len(set(losses)) == len(losses) == len(harness.cores())
    low, high = throughput.band(64, 0.0)
    assert all(low < loss < high for loss in losses)


def test_launches_are_those_of_the_innermost_loop():
    assert count(LISTING) == (40, 1)  # By hand: lines 065 to 104 of it, in one command buffer.
    assert count(re.sub(r"^        000: kCommandBuffer.*\n", "", LISTING, flags=re.MULTILINE)) == (40, 40)
    assert count(f"{LISTING}    106: kAsyncStart\n        107: kCopy\n    109: kAsyncDone\n") == (40, 1)
    assert count("000: kCopy\n001: kCommandBuffer\n    002: kKernel\n    003: kGemm\n") == (3, 2)
    with pytest.raises(ValueError, match="this version of XLA may list them otherwise"):
        count("fusion.1\n")


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_damage_goes_unnoticed(name):
    with fuzz.TARGETS[name]() as target:
        ends = collections.Counter(outcome.end for outcome in fuzz.run(target, 150, seed=1))
    assert not ends.keys() & set(fuzz.FAILURES)
    # A damaged checkpoint is passed over for the one before it.
    assert ends["error by name"] > 150 / 4 or name == "checkpoint"


def test_a_reader_that_misses_damage_is_found_out():
    def ends(load):
        return {outcome.end for outcome in fuzz.run(fuzz.Target({"file": b"content"}, load), 5, seed=0)}

    # Without checks, without a name, and without care.
    assert [ends(load) for load in (lambda _: False, lambda _: int("x"), {}.pop)] == [{end} for end in fuzz.FAILURES]
