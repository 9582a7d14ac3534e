"""How many kernels does a training step launch on a GPU, and what makes them fewer? No GPU need be there."""

import dataclasses
import functools
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import harness
from benchmarks.roofline import without
from fashion_jax import Batch, TrainConfig
from fashion_jax.train import init_state, train_epoch, train_step

TARGET = Path(__file__).with_name("h100.txtpb")
IMAGES = 60_000
# A line of XLA's listing: indentation, number and kind of what is launched.
LINE = re.compile(r"^(?P<indent> *)\d+: k(?P<kind>\w+)")
HOLDERS = ("CommandBuffer", "While", "Conditional", "Sequential")


@dataclasses.dataclass(frozen=True)
class Flags:
    batch_size: int = 64
    """Examples in a step."""
    lanes: int = 64
    """Models of the program that trains many together."""
    target: Annotated[Path, tyro.conf.arg(metavar="FILE")] = TARGET
    """The GPU to compile for where there is none: XLA's GpuTargetConfigProto as text."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


class Launches(NamedTuple):
    """What one pass of a loop's body launches, or a program without a loop.

    Attributes:
        kernels: Kernels and copies.
        by_host: What the host launches for them: a command buffer is one.
    """

    kernels: int
    by_host: int


def count(listing: str) -> Launches:
    """Count what the innermost loop of a program launches, or the program itself if there is no loop.

    Args:
        listing: XLA's thunk_sequence.txt: one line a launch, indented by what holds it.

    Raises:
        ValueError: Nothing that is launched is found.

    >>> count('''000: kCopy
    ... 001: kWhile
    ... condition:
    ...     002: kKernel
    ...   body:
    ...     000: kCommandBuffer
    ...         003: kKernel
    ...         004: kGemm''')
    Launches(kernels=2, by_host=1)
    """
    # Bodies come after their conditions, and inner loops after what surrounds them.
    _, _, body = listing.rpartition("body:")
    found = [match for line in body.splitlines() if (match := LINE.match(line))]
    if not found:
        raise ValueError("XLA listed no launches; this version of XLA may list them otherwise")
    top = len(found[0]["indent"])
    inside = [match for match in found if len(match["indent"]) >= top]
    return Launches(
        sum(match["kind"] not in HOLDERS for match in inside), sum(len(match["indent"]) == top for match in inside)
    )


def devices(target: Path) -> tuple[Any, str]:
    """Give the GPU to compile for, and say what it is.

    Raises:
        ValueError: JAX here cannot compile for GPUs.
    """
    # Without a driver JAX's plugin refuses to start, although it can compile.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    if jax.default_backend() == "gpu":
        return jax.devices()[:1], jax.devices()[0].device_kind
    description = target.read_text()
    try:
        found = topologies.get_topology_desc("", "cuda", target_config=description, topology="1x1x1").devices
    except (NotImplementedError, RuntimeError) as error:
        raise ValueError(
            f"JAX cannot compile for a GPU here ({str(error).splitlines()[0]}); install jax-cuda12-plugin and "
            f"jax-cuda12-pjrt of version {jax.__version__} with --no-deps, and nvidia-cuda-nvcc-cu12"
        ) from error
    return found, f"{found[0].device_kind}, described by {target.name} and not there"


def main(flags: Flags) -> None:
    target, about = devices(flags.target)
    sharding = NamedSharding(Mesh(np.array(target), ("gpus",)), PartitionSpec())

    def shapes(make: Callable[..., Any], *arguments: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(make, *arguments),
        )

    def examples(n: int) -> Batch:
        return shapes(lambda: Batch(jnp.zeros((n, 28, 28), jnp.uint8), jnp.zeros(n, jnp.int32)))

    def compiled(program: Callable[..., Any], *arguments: Any, **options: Any) -> Launches:
        with tempfile.TemporaryDirectory() as dumped:
            jax.jit(program).lower(*arguments).compile(compiler_options={"xla_dump_to": dumped, **options})
            # The second is there if command buffers changed the first.
            listings = sorted(Path(dumped).glob("*thunk_sequence*.txt"), key=lambda path: "after" in path.name)
            return count(listings[-1].read_text() if listings else "")

    config = TrainConfig(batch_size=flags.batch_size)
    one = shapes(lambda: jax.random.key(0))
    many = shapes(lambda: jax.random.split(jax.random.key(0), flags.lanes))
    data, batch = examples(IMAGES), examples(flags.batch_size)

    def epoch(config: TrainConfig = config, **options: Any) -> Launches:
        state = shapes(functools.partial(init_state, config=config), one)
        return compiled(functools.partial(train_epoch, config=config, dropout_rate=0.2), state, data, one, **options)

    def epoch_without(part: str) -> Launches:
        with without(part):
            return epoch(dataclasses.replace(config, optimiser=optax.sgd) if part == "Adam" else config)

    def unrolled(times: int) -> Launches:
        with without("nothing"), mock.patch.object(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=times)):
            return epoch()

    def step() -> Launches:
        state = shapes(functools.partial(init_state, config=config), one)
        return compiled(functools.partial(train_step, config=config, dropout_rate=0.2), state, batch, one)

    def together() -> Launches:
        def all_lanes(keys, data):
            def lane(key):
                return train_epoch(init_state(key, config=config), data, key, config=config, dropout_rate=0.2)

            return jax.vmap(lane)(keys)

        return compiled(all_lanes, many, data)

    def one_leaf(learning_rate):
        return optax.flatten(optax.adam(learning_rate))

    def by_index(log_probs, labels):
        return -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]

    programs: dict[str, tuple[Callable[[], Launches], int, int]] = {
        "the epoch of `fit`": (epoch, 1, 1),
        "without command buffers": (lambda: epoch(xla_gpu_enable_command_buffer=""), 1, 1),
        "products by cuBLAS alone": (lambda: epoch(xla_gpu_enable_triton_gemm=False), 1, 1),
        "two steps a pass of the loop": (lambda: unrolled(2), 2, 1),
        "Adam's numbers in one leaf": (lambda: epoch(dataclasses.replace(config, optimiser=one_leaf)), 1, 1),
        "loss by an index in each row": (lambda: epoch(dataclasses.replace(config, loss=by_index)), 1, 1),
        "without Adam (plain gradient descent)": (lambda: epoch_without("Adam"), 1, 1),
        "without dropout's random numbers": (lambda: epoch_without("dropout's random numbers"), 1, 1),
        "one jitted step at a time": (step, 1, 1),
        f"{flags.lanes} models together": (together, 1, flags.lanes),
    }
    rows: list[harness.Row] = []
    for name, (program, steps, models) in programs.items():
        launches = program()
        rows.append(
            {
                "program": name,
                "kernels a step": launches.kernels / steps,
                "launched by the host a step": launches.by_host / steps,
                "kernels a step and model": launches.kernels / steps / models,
            }
        )
    print(f"compiled for {about}")
    flags = dataclasses.replace(flags, target=Path(flags.target.name))
    harness.write("kernels", rows, flags=flags, output=flags.output, figure=None, compiled_for=about)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
