"""How many kernels does a training step launch on a GPU, what makes them fewer, and what does that save?

They are counted without a GPU too, and timed where one is.
"""

import contextlib
import dataclasses
import functools
import itertools
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
HOLDERS = ("CommandBuffer", "While", "Conditional", "Sequential", "AsyncStart", "AsyncDone", "DynamicSliceFusion")
# What XLA puts into command buffers: loops are not among it by default.
LOOPS_TOO = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,CONDITIONAL,DYNAMIC_SLICE_FUSION,WHILE"
# Calls of a program without a loop that are timed together.
CALLS = 500


@dataclasses.dataclass(frozen=True)
class Flags:
    batch_size: int = 64
    """Examples in a step."""
    lanes: int = 64
    """Models of the program that trains many together."""
    repetitions: int = 5
    """Timed runs of each program, in turns, if there is a GPU."""
    target: Annotated[Path, tyro.conf.arg(metavar="FILE")] = TARGET
    """The GPU to compile for where there is none: XLA's GpuTargetConfigProto as text."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder for the record; by default benchmarks/records/<date>-<device>."""


class Launches(NamedTuple):
    """What one pass of a loop's body launches, or a program without a loop.

    Attributes:
        kernels: Kernels and copies.
        by_host: What the host launches for them: a command buffer is one, and one that holds the loop is none.
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
    before, _, body = listing.rpartition("body:")
    found = _launches(body)
    if not found:
        raise ValueError("XLA listed no launches; this version of XLA may list them otherwise")
    top = len(found[0]["indent"])
    # Further out again, what follows is launched after the loop.
    inside = list(itertools.takewhile(lambda match: len(match["indent"]) >= top, found))
    kernels = sum(match["kind"] not in HOLDERS for match in inside)
    if "CommandBuffer" in _around_the_loop(_launches(before)):
        return Launches(kernels, 0)
    return Launches(kernels, sum(len(match["indent"]) == top for match in inside if match["kind"] != "AsyncDone"))


def _launches(listing: str) -> list[re.Match[str]]:
    return [match for line in listing.splitlines() if (match := LINE.match(line))]


def _around_the_loop(before: list[re.Match[str]]) -> list[str]:
    """Name the kinds of what holds the last loop that begins here."""
    loops = [i for i, match in enumerate(before) if match["kind"] == "While"]
    holders: list[str] = []
    if loops:
        indent = len(before[loops[-1]]["indent"])
        for match in reversed(before[: loops[-1]]):
            if len(match["indent"]) < indent:
                indent = len(match["indent"])
                holders.append(match["kind"])
    return holders


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


class Compiled(NamedTuple):
    """A program for the GPU.

    Attributes:
        launches: What a pass of its loop launches.
        run: Starts it, where there is a GPU, and gives what it computes.
        steps: Steps of such a run.
        unrolled: Steps that a pass of its loop takes.
        models: How many it trains.
    """

    launches: Launches
    run: Callable[[], Any]
    steps: int
    unrolled: int = 1
    models: int = 1


def main(flags: Flags) -> None:
    target, about = devices(flags.target)
    there = jax.default_backend() == "gpu"
    sharding = NamedSharding(Mesh(np.array(target), ("gpus",)), PartitionSpec())

    def made(make: Callable[..., Any], *arguments: Any) -> Any:
        """Make what a program takes; where it cannot run, its shapes will do."""
        if there:
            return jax.jit(make)(*arguments)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            jax.eval_shape(make, *arguments),
        )

    def examples(n: int) -> Batch:
        def draw(key):
            return Batch(jax.random.bits(key, (n, 28, 28), jnp.uint8), jax.random.randint(key, (n,), 0, 10))

        return made(draw, one)

    def compiled(program: Callable[..., Any], state: Any, *others: Any, **options: Any) -> Compiled:
        with tempfile.TemporaryDirectory() as dumped:
            lowered = jax.jit(program).lower(state, *others)
            executable = lowered.compile(compiler_options={"xla_dump_to": dumped, **options})
            # The second is there if command buffers changed the first.
            listings = sorted(Path(dumped).glob("*thunk_sequence*.txt"), key=lambda path: "after" in path.name)
            launches = count(listings[-1].read_text() if listings else "")

        def run() -> Any:
            # From the state that the run before left, as in `fit`.
            nonlocal state
            state, result = executable(state, *others)
            return state, result

        return Compiled(launches, run, steps)

    config = TrainConfig(batch_size=flags.batch_size)
    steps = config.steps_per_epoch(IMAGES)
    one = made(lambda: jax.random.key(0))
    many = made(lambda: jax.random.split(jax.random.key(0), flags.lanes))
    data, batch = examples(IMAGES), examples(flags.batch_size)

    def epoch(config: TrainConfig = config, **options: Any) -> Compiled:
        state = made(functools.partial(init_state, config=config), one)
        return compiled(functools.partial(train_epoch, config=config, dropout_rate=0.2), state, data, one, **options)

    def epoch_without(part: str) -> Compiled:
        with without(part):
            return epoch(dataclasses.replace(config, optimiser=optax.sgd) if part == "Adam" else config)

    def unrolled(times: int) -> Compiled:
        with without("nothing"), mock.patch.object(jax.lax, "scan", functools.partial(jax.lax.scan, unroll=times)):
            return epoch()._replace(unrolled=times)

    def step() -> Compiled:
        state = made(functools.partial(init_state, config=config), one)
        program = compiled(functools.partial(train_step, config=config, dropout_rate=0.2), state, batch, one)

        def many_steps() -> Any:
            for _ in range(CALLS - 1):
                program.run()
            return program.run()

        return program._replace(run=many_steps, steps=CALLS)

    def together() -> Compiled:
        def all_lanes(states, data, keys):
            def lane(state, key):
                return train_epoch(state, data, key, config=config, dropout_rate=0.2)

            return jax.vmap(lane)(states, keys)

        states = made(jax.vmap(functools.partial(init_state, config=config)), many)
        return compiled(all_lanes, states, data, many)._replace(models=flags.lanes)

    def one_leaf(learning_rate):
        return optax.flatten(optax.adam(learning_rate))

    def by_index(log_probs, labels):
        return -jnp.take_along_axis(log_probs, labels[:, None], axis=1)[:, 0]

    makers: dict[str, Callable[[], Compiled]] = {
        "the epoch of `fit`": epoch,
        "without command buffers": lambda: epoch(xla_gpu_enable_command_buffer=""),
        "kernels of a command buffer side by side": lambda: epoch(xla_gpu_command_buffer_scheduling_mode="CONCURRENT"),
        "the loop in a command buffer too": lambda: epoch(xla_gpu_enable_command_buffer=LOOPS_TOO),
        "products by cuBLAS alone": lambda: epoch(xla_gpu_enable_triton_gemm=False),
        "two steps a pass of the loop": lambda: unrolled(2),
        "Adam's numbers in one leaf": lambda: epoch(dataclasses.replace(config, optimiser=one_leaf)),
        "loss by an index in each row": lambda: epoch(dataclasses.replace(config, loss=by_index)),
        "without Adam (plain gradient descent)": lambda: epoch_without("Adam"),
        "without dropout's random numbers": lambda: epoch_without("dropout's random numbers"),
        "one jitted step at a time": step,
        f"{flags.lanes} models together": together,
    }
    # Where `fit` would see a CPU, it is to do what it does on a GPU.
    with contextlib.nullcontext() if there else mock.patch.object(jax, "default_backend", return_value="gpu"):
        programs = {name: make() for name, make in makers.items()}
    seconds: dict[str, list[float]] = {}
    if there:
        runs = {
            name: lambda program=program: jax.block_until_ready(program.run()) for name, program in programs.items()
        }
        for run in runs.values():
            run()
        seconds = harness.alternate(runs, flags.repetitions)
    rows: list[harness.Row] = []
    for name, program in programs.items():
        row: harness.Row = {
            "program": name,
            "kernels a step": program.launches.kernels / program.unrolled,
            "launched by the host a step": program.launches.by_host / program.unrolled,
            "kernels a step and model": program.launches.kernels / program.unrolled / program.models,
        }
        if there:
            timing = harness.spread(seconds[name])
            row |= {**timing, "us a step and model": 1e6 * timing["median (s)"] / program.steps / program.models}
        rows.append(row)
    print(f"compiled for {about}")
    flags = dataclasses.replace(flags, target=Path(flags.target.name))
    harness.write("kernels", rows, flags=flags, output=flags.output, figure=None, compiled_for=about)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
