"""How much does each optimization in the code save? The epoch of `fit` with and without it, in turns in one process.

An epoch is training and both evaluations, on one device. Each program is compiled several times, also in turns.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from fashion_jax import TrainConfig, model, steps
from fashion_jax.devices import COMPILER_OPTIONS
from fashion_jax.interop import torch_adam
from fashion_jax.train import Carry, _epoch, init_state
from fashion_jax.types import Best

LANES = 4
WHOLE, ONE_BY_ONE = "as it is", f"as it is, {LANES} lanes one at a time"


@dataclasses.dataclass(frozen=True)
class Flags(harness.TimedFlags):
    repetitions: int = 15  # Timed epochs of each program, in turns.
    compilations: int = 3  # Timed compilations of each program, in turns.


def by_index(log_probs, labels):
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]


def on_each_leaf(condition, true, false):
    return jax.tree.map(partial(jnp.where, condition), true(), false())


# How to take each optimization out of `fit`: replaced functions, and a config.
WITHOUT: dict[str, tuple[list[tuple[Any, str, Any]], TrainConfig]] = {
    "Threefry written out: jax.random.uniform": ([(model, "uniform", jax.random.uniform)], TrainConfig()),
    "an order by one sort: jax.random.permutation": (
        [
            (jax.random, "bits", lambda *drawn: drawn),
            (jnp, "argsort", lambda drawn: jax.random.permutation(drawn[0], *drawn[1])),
        ],
        TrainConfig(),
    ),
    "conditions on whole trees: a select for each leaf": ([(jax.lax, "cond", on_each_leaf)], TrainConfig()),
    "the loss as a sum over the row: an index": (
        [(steps, "negative_log_likelihood", by_index)],
        TrainConfig(loss=by_index),
    ),
    "optax.adam: the exact Adam of interop": ([], TrainConfig(optimizer=torch_adam)),
}


def one(key, carry, numbers, data, *, config: TrainConfig = TrainConfig()):
    return _epoch(key, numbers, carry, (np.int32(1), np.True_), data, config=config)


def many(keys, carries, numbers, data, *, at_once: int | None):
    return jax.lax.map(lambda lane: one(lane[0], lane[1], numbers, data), (keys, carries), batch_size=at_once)


def main(flags: Flags) -> None:
    # Compilations are timed.
    jax.config.update("jax_enable_compilation_cache", False)
    key, data = jax.random.key(0), jax.device_put(harness.load_data())
    numbers = {"dropout_rate": 0.2, "learning_rate": 0.003}
    state = init_state(key, **numbers)
    carry = Carry(state, Best(state.params, jnp.array(jnp.inf), jnp.array(0)))
    alone = (key, carry, numbers, data)
    lanes = (jax.random.split(key, LANES), jax.tree.map(lambda leaf: jnp.stack([leaf] * LANES), carry), numbers, data)

    def compiled(
        program, arguments, replacements=(), context: Any = contextlib.nullcontext, options: Any = COMPILER_OPTIONS
    ) -> Callable[[], Any]:
        with harness.replaced(*replacements), context():
            executable = jax.jit(program).lower(*arguments).compile(options)
        return lambda: jax.block_until_ready(executable(*arguments))

    makers = {WHOLE: partial(compiled, one, alone)}
    for name, (replacements, config) in WITHOUT.items():
        makers[f"without {name}"] = partial(compiled, partial(one, config=config), alone, replacements)
    makers["without registers of 512 bits: LLVM's choice"] = partial(compiled, one, alone, options=None)
    default = partial(jax.default_matmul_precision, "default")
    makers["without full precision: JAX's default"] = partial(compiled, one, alone, context=default)
    makers[ONE_BY_ONE] = partial(compiled, partial(many, at_once=None), lanes)
    makers["without lanes one at a time: all at once"] = partial(compiled, partial(many, at_once=LANES), lanes)

    timed_makers = {name: partial(harness.timed, make) for name, make in makers.items()}
    built = harness.take_turns(timed_makers, flags.compilations)
    seconds = harness.alternate({name: made[-1][0] for name, made in built.items()}, flags.repetitions)
    rows: list[harness.Row] = []
    for name, runs in seconds.items():
        base = ONE_BY_ONE if "lanes" in name else WHOLE
        ratios, compilations = np.divide(runs, seconds[base]), [duration for _, duration in built[name]]
        row = {"program": name, "compared with": base, **harness.spread(runs), "ratio": np.median(ratios).item()}
        row |= {
            "ratio, quartiles": harness.quartiles(ratios),
            "compilation, median (s)": np.median(compilations).item(),
        }
        rows.append(row | {"seconds of compilation": compilations})
    harness.write("ablation", rows, flags=flags)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
