"""How close does `fit` come to what this machine can do, and where does the rest of the time go?"""

import contextlib
import dataclasses
import functools
import itertools
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import tyro

from benchmarks import harness
from fashion_jax import Batch, TrainConfig, load, model, train
from fashion_jax.train import evaluate, init_state, train_epoch, train_eval_part, train_step

WIDTHS = (784, *TrainConfig().hidden, 10)
# XLA hands to this library those products that come in a layout which it knows, and computes the others itself.
WITHOUT_YNNPACK: dict[str, Any] = {"xla_cpu_experimental_ynn_fusion_type": ""}


@dataclasses.dataclass(frozen=True)
class Flags:
    batch_size: int = 64
    """Examples in a step."""
    repetitions: int = 7
    """Timed runs of each variant, in turns."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Directory with the data set."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


def flop_of_an_epoch(n: int, widths: tuple[int, ...] = WIDTHS) -> list[float]:
    """Count each layer's matrix products: forward, weight gradient, and input gradient of all layers but the first."""
    return [2.0 * n * a * b * (2 if layer == 0 else 3) for layer, (a, b) in enumerate(itertools.pairwise(widths))]


def gemm_rate(size: int):
    """Make a program that multiplies two square matrices four times."""
    a = jnp.ones((size, size))
    product = jax.jit(lambda a: a @ a @ a @ a @ a)
    return lambda: product(a).block_until_ready(), 4 * 2.0 * size**3


def matrix_products(batch_size: int, steps: int):
    """Make a program of an epoch's matrix products alone, each feeding the next step through the weights."""
    weights = [jnp.full(shape, 0.01) for shape in itertools.pairwise(WIDTHS)]
    x = jnp.ones((batch_size, WIDTHS[0]))

    # XLA multiplies a constant in another, slower way, so the batch is an argument as it is in `fit`.
    @jax.jit
    def run(weights, x):
        def step(weights, _):
            layers = [x]
            for weight in weights:
                layers.append(layers[-1] @ weight)
            delta, gradients = layers.pop(), []
            for layer, weight in zip(reversed(layers), reversed(weights), strict=True):
                gradients.insert(0, layer.T @ delta)
                delta = delta @ weight.T
            return [weight - 1e-9 * gradient for weight, gradient in zip(weights, gradients, strict=True)], None

        return jax.lax.scan(step, weights, None, length=steps)[0]

    return lambda: jax.block_until_ready(run(weights, x))


def layer_products(shape: tuple[int, int], batch_size: int, steps: int, *, first: bool):
    """Make a program of one layer's matrix products alone, as many times as an epoch has steps."""
    weight = jnp.full(shape, 0.01)
    x, delta = (jnp.ones((batch_size, units)) for units in shape)

    def products(weight, x, delta):
        return [x @ weight, x.T @ delta, *([] if first else [delta @ weight.T])]

    @jax.jit
    def run(weight, x, delta):
        def step(carry, _):
            x, delta, (output, gradient, *_) = carry
            # Each pass needs the one before, or a compiler would multiply once.
            x = x.at[0, 0].set(1e-9 * output[0, 0])
            delta = delta.at[0, 0].set(1e-9 * gradient[0, 0])
            return (x, delta, products(weight, x, delta)), None

        return jax.lax.scan(step, (x, delta, products(weight, x, delta)), None, length=steps - 1)[0]

    return lambda: jax.block_until_ready(run(weight, x, delta))


@contextlib.contextmanager
def without(part: str):
    """Leave one part of the training step out while a program is traced."""
    replaced = {
        "Adam": lambda: mock.patch.object(train, "build_optimiser", lambda config: optax.sgd(config.learning_rate)),
        "dropout's random numbers": lambda: mock.patch.object(
            model, "uniform", lambda key, shape: jnp.full(shape, 0.5)
        ),
        "shuffling and gathering": lambda: mock.patch.object(
            train, "_rows", lambda batch, indices: jax.tree.map(lambda leaf: leaf[: len(indices)], batch)
        ),
        "nothing": contextlib.nullcontext,
    }
    jax.clear_caches()
    with replaced[part]():
        yield
    jax.clear_caches()


def main(flags: Flags) -> None:
    # What is compared with the model multiplies as the model does, in float32; a GPU's default is TF32.
    jax.config.update("jax_default_matmul_precision", "highest")
    config = TrainConfig(batch_size=flags.batch_size)
    splits = load(flags.data_dir)
    train_eval = train_eval_part(splits.train, config)
    data, train_eval, test = jax.tree.map(jnp.array, (splits.train, train_eval, splits.test))
    n = len(data.labels)
    steps = -(-n // flags.batch_size)
    key = jax.random.key(0)

    def epoch(part: str, options: dict[str, Any] | None = None):
        with without(part):
            state = init_state(key, config=config)
            if part == "Adam":
                state = state._replace(opt_state=optax.sgd(config.learning_rate).init(state.params))
            # A compilation of its own, in which the part is missing.
            program = jax.jit(functools.partial(train_epoch, config=config, dropout_rate=0.2))
            compiled = program.lower(state, data, key).compile(compiler_options=options)
        return lambda: jax.block_until_ready(compiled(state, data, key))

    state = init_state(key, config=config)
    layers = {f"those of fc{i}, {a} to {b}, alone": (a, b) for i, (a, b) in enumerate(itertools.pairwise(WIDTHS), 1)}
    evaluation = jax.jit(lambda params, *parts: [evaluate(params, part, config=config) for part in parts])
    programs = {
        "training epoch, whole": epoch("nothing"),
        "without Adam (plain gradient descent)": epoch("Adam"),
        "without dropout's random numbers": epoch("dropout's random numbers"),
        "without shuffling and gathering (one batch, again and again)": epoch("shuffling and gathering"),
        "all matrix products, alone": matrix_products(flags.batch_size, steps),
        **{
            name: layer_products(shape, flags.batch_size, steps, first=layer == 0)
            for layer, (name, shape) in enumerate(layers.items())
        },
        "both evaluations alone (20,000 images)": lambda: jax.block_until_ready(
            evaluation(state.params, train_eval, test)
        ),
    }
    if jax.default_backend() == "cpu":
        programs["with no matrix product handed to YNNPACK"] = epoch("nothing", WITHOUT_YNNPACK)
    gemms = {f"GEMM {size}x{size}": gemm_rate(size) for size in (1024, 2048, 3072)}
    programs |= {name: program for name, (program, _) in gemms.items()}
    for program in programs.values():
        program()
    seconds = harness.alternate(programs, flags.repetitions)

    rate = max(flop / harness.spread(seconds[name])["median (s)"] for name, (_, flop) in gemms.items())
    by_layer = flop_of_an_epoch(n)
    counted = sum(by_layer)
    batch = Batch(data.images[: flags.batch_size], data.labels[: flags.batch_size])
    step = jax.jit(functools.partial(train_step, config=config, dropout_rate=0.2)).lower(state, batch, key).compile()
    by_xla = (step.cost_analysis() or {})["flops"] * n / flags.batch_size
    whole = harness.spread(seconds["training epoch, whole"])["median (s)"]
    flop = {"training epoch, whole": counted, "all matrix products, alone": counted}
    flop |= dict(zip(layers, by_layer, strict=True)) | {name: of_gemm for name, (_, of_gemm) in gemms.items()}
    rows: list[harness.Row] = []
    for name, runs in seconds.items():
        row = {"program": name, **harness.spread(runs)}
        if name in flop:
            row["GFLOP/s"] = flop[name] / row["median (s)"] / 1e9
            row["share of GEMM rate"] = flop[name] / row["median (s)"] / rate
        if name.startswith("with"):
            row["share of the epoch that it takes"] = 1 - row["median (s)"] / whole
        rows.append(row)
    print(
        f"FLOP of an epoch's matrix products, counted: {counted / 1e9:.1f} G; all of XLA's count: {by_xla / 1e9:.1f} G"
    )
    drawn = [row for row in rows if row["program"] not in gemms]
    figure = harness.bars(drawn, label="program", value="median (s)", low="min (s)", high="max (s)", unit="seconds")
    harness.write(
        "roofline",
        rows,
        flags=flags,
        output=flags.output,
        figure=figure,
        gemm_gflop_per_s=rate / 1e9,
        epoch_gflop=counted / 1e9,
        epoch_gflop_by_xla=by_xla / 1e9,
        share_of_gemm_rate=counted / whole / rate,
    )


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
