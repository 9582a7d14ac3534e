"""The benchmarks measure what they say: turns, summaries, ablations, PyTorch's loops, damaged files."""

import collections
import json
import runpy
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import tyro

from benchmarks import __main__ as all_benchmarks
from benchmarks import ablation, fuzz, harness, lanes, reference, reproduce, throughput
from fashion_jax import Batch, FashionMLP, TrainConfig, fit, sweep
from fashion_jax.interop import from_torch
from fashion_jax.train import Carry, Data, evaluate, init_state, train_step
from fashion_jax.types import Best

KEY = jax.random.key(0)
# Without hidden layers, programs compile faster.
LINEAR = TrainConfig(model=FashionMLP(hidden=()), batch_size=20)


@pytest.fixture
def few(small) -> Data:
    return Data(*(Batch(small.images[:n], small.labels[:n]) for n in (50, 30, 40)))


def test_programs_take_turns_and_their_timings_are_summarized():
    order = []
    seconds = harness.alternate({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert "".join(order) == "ababab"
    assert [len(runs) for runs in seconds.values()] == [2, 2]
    summary = {"median (s)": 2.0, "min (s)": 1.0, "max (s)": 9.0, "quartiles (s)": [1.5, 5.5], "repetitions": 3}
    assert harness.spread([1.0, 9.0, 2.0]) == summary | {"seconds": [1.0, 9.0, 2.0]}
    # Pair by pair 1, 3 and 1; of the medians it would be 4/3.
    assert harness.ratio([2.0, 9.0, 4.0], [2.0, 3.0, 4.0]) == 1.0


def test_a_turn_is_an_epoch_and_its_evaluations(few):
    evaluated, loop = [], reference.FastLoop(few.train, dropout_rate=0.2, batch_size=20)
    steps, fits = throughput.JaxSteps(LINEAR, few), throughput.JaxFit(LINEAR, few)
    turns = {"steps": steps.turn, "fit": fits.turn, "torch": throughput.Torch(loop, few).turn}
    loop.evaluate = lambda batches: evaluated.append(sum(len(labels) for _, labels in batches))
    for runs in harness.take_turns(turns, 2).values():
        assert 0 < runs[1].loss < runs[0].loss
        assert all(turn.training > 0 and turn.both > 0 for turn in runs)
    assert (int(steps.state.step), int(fits.state.step)) == (6, 6)
    assert {int(state["step"]) for state in loop.optimizer.state.values()} == {6}
    assert evaluated == [30, 40] * 2


@pytest.mark.parametrize("grid", [False, True])
def test_many_models_race_those_of_pytorch(few, monkeypatch, tmp_path, grid):
    """With few images; the grid as on a GPU, without further processes."""
    monkeypatch.setattr(harness, "use_device", lambda device: "cpu:0" if grid else device)
    monkeypatch.setattr(harness, "load_data", lambda: few)
    monkeypatch.setattr(harness, "cores", lambda cores=harness.cores: cores()[:1])
    monkeypatch.setattr(lanes, "use_all_cores", lambda: None)
    monkeypatch.setattr(lanes, "fit", partial(fit, config=LINEAR))
    monkeypatch.setattr(lanes, "sweep", partial(sweep, config=LINEAR))
    monkeypatch.setattr(lanes, "GRID", {"dropout_rate": (0.0, 0.2), "weight_decay": (0.0, 0.1)})
    lanes.main(lanes.Flags(lanes=(2,), grid=grid, compile=False, batched=True, repetitions=2, output=tmp_path))
    rows = json.loads((tmp_path / ("grid.json" if grid else "lanes.json")).read_text())["rows"]
    by_hand, each = "PyTorch, gradients by hand", ", a process on each core"
    models = {by_hand: 2, "sweep, 4 lanes": 4}
    if not grid:
        two = (lanes.EAGER, "PyTorch, the same" + each, by_hand, by_hand + each, "PyTorch, 2 models in one step")
        models = dict.fromkeys(two, 2) | {"fit": 1, "sweep, 2 lanes": 2}
    assert {row["program"]: row["models timed"] for row in rows} == models
    for row in rows:
        assert [len(row["seconds"]), min(row["seconds"]) > 0] == [2, True]
        assert min(row[f"/ {other}"] for other in models if not other.startswith("sweep")) > 0
        assert row["models x images/s"] == pytest.approx(50 / np.median(row["seconds"]))


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


@pytest.mark.parametrize("kind", [reference.TutorialLoop, reference.FastLoop])
def test_pytorch_s_loops_are_the_experiment(small, few, kind):
    """One batch per epoch, so that its order does not matter; in float64, where rounding turns no step of Adam."""
    loop = kind(few.train, dropout_rate=0.0, batch_size=50)
    loop.model.double().register_forward_pre_hook(lambda model, images: images[0].double())
    with jax.enable_x64(True):
        state = init_state(KEY)._replace(params=from_torch(loop.model.state_dict()))
        for _ in range(4):
            state, metrics = train_step(state, few.train, KEY)
            assert loop.epoch() == pytest.approx(float(metrics.loss), rel=1e-6)
        np.testing.assert_allclose(loop.evaluate(loop.prepare(small)), evaluate(state.params, small), rtol=1e-6)


@pytest.mark.parametrize("kind", [reference.TutorialLoop, reference.FastLoop])
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


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_no_damage_goes_unnoticed(name):
    with fuzz.TARGETS[name]() as target:
        ends = collections.Counter(outcome.end for outcome in fuzz.run(target, 150, seed=1))
    assert not ends.keys() & set(fuzz.FAILURES)
    # A damaged checkpoint is passed over for the one before it.
    assert ends["error by name"] > 0.3 * 150 or name == "checkpoint"


def test_a_reader_that_misses_damage_is_found_out():
    def ends(load):
        return {outcome.end for outcome in fuzz.run(fuzz.Target({"file": b"content"}, load), 5, seed=0)}

    # Without checks, without a name, and without care.
    assert [ends(load) for load in (lambda _: False, lambda _: int("x"), {}.pop)] == [{end} for end in fuzz.FAILURES]


def drawn_masks(*shape: int) -> list[torch.Tensor]:
    return [torch.empty(*shape, width).bernoulli_(0.8).div_(0.8) for width in reference.HIDDEN]


# Adam, the default, and AdamW with two numbers whose product is exact in float32.
@pytest.mark.parametrize(("learning_rate", "weight_decay"), [(0.003, 0.0), (2**-10, 8.0)])
def test_steps_by_hand_and_in_one_function_are_autograd_and_adamw_in_float64(few, learning_rate, weight_decay):
    numbers = {"learning_rate": learning_rate, "weight_decay": weight_decay} if weight_decay else {}
    options = {"dropout_rate": 0.2, "batch_size": 20}
    exact = reference.MaskedLoop(few.train, **options)
    by_hand, in_one = (kind(few.train, **options, **numbers) for kind in (reference.HandLoop, reference.CompiledLoop))
    in_one.update = reference._update  # What torch.compile compiles, which takes a minute.
    for tensors in (in_one.params, *in_one.moments, in_one.numbers):
        tensors[:] = [tensor.double() for tensor in tensors]
    in_one.images, in_one.inputs = in_one.images.double(), in_one.inputs.double()
    params = list(exact.model.double().parameters())
    exact.optimizer = torch.optim.AdamW(params, learning_rate, weight_decay=weight_decay)
    order, masks, losses = torch.randperm(50), drawn_masks(50), []
    doubled = [mask.double() for mask in masks]
    for i, rows in enumerate(order.split(20)):  # The last batch is short.
        parts = [mask.split(20)[i] for mask in doubled]
        losses.append(exact.masked_step(in_one.images[rows], in_one.labels[rows], *parts).item())
    np.testing.assert_allclose(in_one.train_on(order, doubled), losses, rtol=1e-9)
    np.testing.assert_allclose(by_hand.train_on(order, masks), losses, rtol=1e-5)
    for param, ours, theirs in zip(params, in_one.params, by_hand.model.parameters(), strict=True):
        np.testing.assert_allclose(ours, param.detach(), rtol=1e-9, atol=1e-12)
        # In float32, because Adam's first steps have one length, whatever the gradient's size.
        np.testing.assert_allclose(theirs.detach(), param.detach(), atol=2e-4)


@pytest.mark.parametrize("batch_size", [50, 64])
def test_gradients_by_hand_are_those_of_autograd_in_float64(few, batch_size):
    loop, masks = reference.HandLoop(few.train, dropout_rate=0.2, batch_size=batch_size), drawn_masks(50)
    params = [param.detach().double().requires_grad_() for param in loop.model.parameters()]
    loop.train_on(torch.arange(50), masks)
    loss = reference.masked_loss(params, loop.images.double(), loop.labels, [mask.double() for mask in masks])
    grads = torch.autograd.grad(loss, params)
    for layer, weight, bias in zip(loop.layers(50), grads[::2], grads[1::2], strict=True):
        np.testing.assert_allclose(layer.grad, torch.cat([weight.t(), bias[None]]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_masks_drop_units_at_the_rate_and_make_up_for_it(rate):
    mask = torch.empty(1_000, 256)
    reference.draw(mask, rate)
    np.testing.assert_allclose(mask.unique(), [0, 1 / (1 - rate)], rtol=1e-6)
    # Four units share a draw; five standard deviations.
    dropped = (mask == 0).view(-1, 4).double()
    np.testing.assert_allclose(dropped.mean(dim=0), rate, atol=5 * (rate * (1 - rate) / len(dropped)) ** 0.5)
    np.testing.assert_allclose(dropped.T.corrcoef(), np.eye(4), atol=5 / len(dropped) ** 0.5)


def test_each_of_many_models_in_a_step_is_as_if_trained_alone(few):
    together = reference.BatchedLoop(few.train, dropout_rate=[0.2] * 3, batch_size=20)
    alone = [reference.MaskedLoop(few.train, dropout_rate=0.2, batch_size=20) for _ in range(3)]
    for i, loop in enumerate(alone):
        layers = zip(("fc1", "fc2", "fc3", "fc4"), together.model.weights, together.model.biases, strict=True)
        params = {name: {"kernel": weight.data[i], "bias": bias.data[i, 0]} for name, weight, bias in layers}
        reference.set_params(loop.model, params)
    for loop in (together, *alone):
        loop.model.double()
        loop.images = loop.images.double()
    for rows in together.order().split(20, dim=1):  # The last batch is short.
        masks = [mask.double() for mask in drawn_masks(*rows.shape)]
        together.model.masks = lambda n, masks=masks: masks
        steps = [(loop.images[order], loop.labels[order]) for loop, order in zip(alone, rows, strict=True)]
        losses = [loop.masked_step(*steps[i], *(mask[i] for mask in masks)).item() for i, loop in enumerate(alone)]
        np.testing.assert_allclose(together.step(rows), losses, rtol=1e-9)
    batches = [(images.double(), labels) for images, labels in together.prepare(few.validation)]
    expected = np.transpose([loop.evaluate(batches) for loop in alone])
    np.testing.assert_allclose(together.evaluate(batches), expected, rtol=1e-9)


def test_many_models_in_a_step_have_their_own_order_rate_and_weights(few):
    rates = [0.0, 0.2, 0.5]
    loop = reference.BatchedLoop(few.train, dropout_rate=rates, batch_size=20)
    orders = loop.order()
    np.testing.assert_array_equal(orders.sort(dim=1).values, [range(50)] * 3)
    assert len(orders.unique(dim=0)) == 3
    assert [len(weight.unique(dim=0)) for weight in loop.model.weights] == [3] * 4
    for mask in loop.model.masks(1_000):
        for kept, rate in zip(mask, rates, strict=True):
            np.testing.assert_allclose(kept.unique(), [0, 1 / (1 - rate)] if rate else [1], rtol=1e-6)
            atol = 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
            np.testing.assert_allclose((kept == 0).double().mean(), rate, atol=atol)
    first, second = loop.epoch(), loop.epoch()
    assert np.all(np.array(second) < first)
    assert np.shape(first) == (3,)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("many", [False, True])
def test_a_recorded_step_is_a_step(few, many):
    options = {"dropout_rate": [0.0] * 3 if many else 0.0, "batch_size": 20, "device": "cuda"}
    kinds = [reference.BatchedGraphLoop, reference.BatchedLoop] if many else [reference.GraphLoop, reference.FastLoop]
    recorded, eager = (kind(few.train, **options) for kind in kinds)
    eager.model.load_state_dict(recorded.model.state_dict())
    for rows in (rows for _ in range(3) for rows in eager.order().split(20, dim=-1)):
        np.testing.assert_allclose(recorded.step(rows).cpu(), eager.step(rows).cpu(), rtol=1e-4)


SETS = [("-m", f"benchmarks.{name}", *flags) for each in all_benchmarks.SETS.values() for name, flags in each.items()]


@pytest.mark.parametrize("command", SETS + list(reproduce.STEPS.values()), ids=" ".join)
def test_sets_and_steps_name_scripts_and_their_flags(command):
    program, *flags = command
    if program == "-m":
        program, flags = flags[0].replace(".", "/") + ".py", flags[1:]
    else:
        flags += ["--checkpoint", "y"]
    script = runpy.run_path(str(harness.ROOT / program), run_name="not main")
    tyro.cli(script["Flags"], args=[*flags, "--data-dir", "x", "--output", "y"])


def test_a_failed_step_does_not_end_the_others_and_is_tried_again(tmp_path, monkeypatch):
    code = "import pathlib, sys; path = pathlib.Path(sys.argv[2] + '.tried'); tried = path.exists(); path.touch(); "
    steps = {"fails": ("-c", code + "sys.exit(not tried)"), "works": ("-c", code + "sys.exit(tried)")}
    monkeypatch.setattr(reproduce, "STEPS", steps)
    flags = reproduce.Flags(only=("fails", "works"), output=tmp_path)
    record = tmp_path / "reproduce.json"
    assert reproduce.main(flags) == 1
    before = json.loads(record.read_text())["steps"]
    assert [step["finished"] for step in before.values()] == [False, True]
    assert reproduce.main(flags) == 0
    after = json.loads(record.read_text())["steps"]
    assert after["works"] == before["works"]
    assert (after["fails"]["finished"], after["fails"]["seconds"] > before["fails"]["seconds"]) == (True, True)
