"""What does the order of axes save where networks convolve? Epochs with and without it, and single steps, in turns."""

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import harness
from fashion_jax import Dropout, TrainConfig, _convolution, load, subset
from fashion_jax.devices import COMPILER_OPTIONS
from fashion_jax.model import normalize
from fashion_jax.train import init_state, train_epoch, train_step
from fashion_jax.types import Batch

NUMBERS = {"dropout_rate": 0.2, "learning_rate": 0.003}


class CNN(nn.Module):
    """Two convolutions, each halving the image by its stride or by pooling."""

    channels: tuple[int, int]
    pool: bool
    dropout_rate: float = 0.0

    @nn.compact
    def __call__(self, images, *, deterministic):
        x = normalize(images)[..., None]
        for channels in self.channels:
            x = nn.relu(nn.Conv(channels, (3, 3), strides=1 if self.pool else 2)(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if self.pool else x
        x = Dropout(self.dropout_rate)(x.reshape(len(x), -1), deterministic=deterministic)
        return nn.log_softmax(nn.Dense(10)(x))


NETWORKS = {"8 and 16 channels, strides": CNN((8, 16), False), "16 and 32 channels, pooling": CNN((16, 32), True)}


@dataclasses.dataclass(frozen=True)
class Flags(harness.TimedFlags):
    images: int = 2_048  # Training images of an epoch.


def as_they_come(call, args, kwargs, context):
    return call(*args, **kwargs)


def main(flags: Flags) -> None:
    key, train = jax.random.key(0), subset(load().train, flags.images, key=jax.random.key(0))
    on_device = jax.tree.map(jnp.array, train)
    rows: list[harness.Row] = []
    for network, model in NETWORKS.items():
        config = TrainConfig(model=model)
        state = init_state(key, config=config, **NUMBERS)

        def compiled(program: Callable[..., object], *arguments: object) -> Callable[..., object]:
            return jax.jit(program).lower(*arguments).compile(COMPILER_OPTIONS)

        def epoch(state, train, config=config):
            return train_epoch(state, train, key, config=config, **NUMBERS)

        def one_step(state, train, rows, config=config):
            batch = Batch(train.images[rows], train.labels[rows])
            return train_step(state, batch, key, config=config, **NUMBERS)

        def loop(step, state=state):
            for rows in np.random.default_rng(0).permutation(flags.images).reshape(-1, 64):
                state, _ = step(state, on_device, rows)
            return state

        ordered = compiled(epoch, state, on_device)
        with harness.replaced((_convolution, "in_every_layer", as_they_come)):
            unordered = compiled(epoch, state, on_device)
            step = compiled(one_step, state, on_device, np.arange(64))
        programs = {
            "an epoch as one program, as it is": partial(ordered, state, on_device),
            "the same, axes in JAX's order": partial(unordered, state, on_device),
            "a compiled step at a time, axes in JAX's order": partial(loop, step),
        }
        programs = {name: partial(lambda run: jax.block_until_ready(run()), run) for name, run in programs.items()}
        seconds = harness.alternate(programs, flags.repetitions)
        first = next(iter(seconds.values()))
        for name, runs in seconds.items():
            row = {"program": f"{network}: {name}", **harness.spread(runs)}
            rows.append(row | {"times as long": harness.ratio(runs, first)})
    harness.write("convolutions", rows, flags=flags)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
