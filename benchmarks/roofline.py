"""How close does `fit` come to what this machine can do, and where does the rest of the time go?"""

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness
from fashion_jax import FashionMLP, TrainConfig, model
from fashion_jax.devices import COMPILER_OPTIONS
from fashion_jax.train import evaluate, init_state, train_epoch, train_step

WIDTHS = (784, *FashionMLP().hidden, 10)
WHOLE, PRODUCTS = "training epoch, whole", "all matrix products, alone"
# XLA hands to this library those products that come in a layout which it knows, and computes the others itself.
WITHOUT_YNNPACK: dict[str, Any] = COMPILER_OPTIONS | {"xla_cpu_experimental_ynn_fusion_type": ""}
# Dropout with the same "random" numbers everywhere.
NO_RANDOM_NUMBERS = (model, "uniform", lambda key, shape: jnp.full(shape, 0.5))


@dataclasses.dataclass(frozen=True)
class Flags(harness.TimedFlags):
    batch_size: int = 64  # Examples in a step.


def flop_of_an_epoch(n: int, widths: tuple[int, ...] = WIDTHS) -> list[float]:
    """Count each layer's matrix products: forward, weight gradient, and input gradient of all layers but the first."""
    return [2.0 * n * a * b * (2 if layer == 0 else 3) for layer, (a, b) in enumerate(itertools.pairwise(widths))]


# XLA multiplies a constant in another, slower way, so what is multiplied is an argument, as it is in `fit`.


@jax.jit
def gemms(a):
    return a @ a @ a @ a @ a


@partial(jax.jit, static_argnames="steps")
def all_products(weights, x, *, steps: int):
    """Multiply as an epoch does, each step feeding the next through the weights."""

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


@partial(jax.jit, static_argnames=("steps", "first"))
def layer_products(weight, x, delta, *, steps: int, first: bool):
    """Multiply as one layer does in an epoch."""

    def products(x, delta):
        return [x @ weight, x.T @ delta, *([] if first else [delta @ weight.T])]

    def step(carry, _):
        x, delta, (output, gradient, *_) = carry
        # Each pass needs the one before, or a compiler would multiply once.
        x = x.at[0, 0].set(1e-9 * output[0, 0])
        delta = delta.at[0, 0].set(1e-9 * gradient[0, 0])
        return (x, delta, products(x, delta)), None

    return jax.lax.scan(step, (x, delta, products(x, delta)), None, length=steps - 1)[0]


def one_batch(state, data, key, *, config: TrainConfig, **numbers):
    """Train for an epoch on the same batch at every step."""
    batch = jax.tree.map(lambda leaf: leaf[: config.batch_size], data)
    keys = jax.random.split(key, -(-len(data.labels) // config.batch_size))
    return jax.lax.scan(lambda state, key: train_step(state, batch, key, config=config, **numbers), state, keys)


def main(flags: Flags) -> None:
    # What is compared with the model multiplies as the model does, in float32; a GPU's default is TF32.
    jax.config.update("jax_default_matmul_precision", "highest")
    train, *parts = jax.device_put(harness.load_data())
    key, config, n = jax.random.key(0), TrainConfig(batch_size=flags.batch_size), len(train.labels)
    steps, params = -(-n // flags.batch_size), init_state(key).params

    def ready(program: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(program(*arguments, **options))

    def epoch(config: TrainConfig = config, program: Callable[..., Any] = train_epoch, options: Any = COMPILER_OPTIONS):
        arguments, numbers = (init_state(key, config=config), train, key), {"dropout_rate": 0.2, "learning_rate": 0.003}
        lowered = jax.jit(partial(program, config=config)).lower(*arguments, **numbers)
        return ready(lowered.compile(options), *arguments, **numbers)

    programs = {
        WHOLE: epoch(),
        "without Adam (plain gradient descent)": epoch(dataclasses.replace(config, optimizer=optax.sgd)),
        "without shuffling and gathering (one batch, again and again)": epoch(program=one_batch),
    }
    with harness.replaced(NO_RANDOM_NUMBERS):
        programs["without dropout's random numbers"] = epoch()
    if jax.default_backend() == "cpu":
        programs["with no matrix product handed to YNNPACK"] = epoch(options=WITHOUT_YNNPACK)
    flop = {WHOLE: sum(flop_of_an_epoch(n)), PRODUCTS: sum(flop_of_an_epoch(n))}
    x, *deltas = (jnp.ones((flags.batch_size, width)) for width in WIDTHS)
    weights = [jnp.full(shape, 0.01) for shape in itertools.pairwise(WIDTHS)]
    programs[PRODUCTS] = ready(all_products, weights, x, steps=steps)
    for i, of_layer in enumerate(flop_of_an_epoch(n)):
        name = f"those of fc{i + 1}, {WIDTHS[i]} to {WIDTHS[i + 1]}, alone"
        layer = (weights[i], [x, *deltas][i], deltas[i])
        programs[name], flop[name] = ready(layer_products, *layer, steps=steps, first=i == 0), of_layer
    programs["both evaluations alone (20,000 images)"] = ready(
        lambda: [evaluate(params, part, config=config) for part in parts]
    )
    for size in (1024, 2048, 3072):
        name = f"GEMM {size}x{size}"
        programs[name], flop[name] = ready(gemms, jnp.ones((size, size))), 4 * 2.0 * size**3
    seconds = harness.alternate(programs, flags.repetitions)

    rates = {name: flop[name] / np.median(seconds[name]).item() for name in flop}
    rate = max(rates[name] for name in rates if name.startswith("GEMM"))
    rows: list[harness.Row] = []
    for name, runs in seconds.items():
        row = {"program": name, **harness.spread(runs)}
        if name in rates:
            row |= {"GFLOP/s": rates[name] / 1e9, "share of GEMM rate": rates[name] / rate}
        if name.startswith("with"):
            row["share of the epoch that it takes"] = 1 - harness.ratio(runs, seconds[WHOLE])
        rows.append(row)
    harness.write("roofline", rows, flags=flags, gemm_gflop_per_s=rate / 1e9, epoch_gflop=flop[WHOLE] / 1e9)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
