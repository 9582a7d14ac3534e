"""How many kernels does a training step launch on a GPU, what makes them fewer, and what does that save?

They are counted without a GPU too, and timed where one is.
"""

import dataclasses
import itertools
import os
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import harness
from benchmarks.roofline import NO_RANDOM_NUMBERS
from fashion_jax import Batch, TrainConfig
from fashion_jax.train import init_state, train_epoch, train_step

IMAGES = 60_000
# XLA's GpuTargetConfigProto as text.
H100 = Path(__file__).with_name("h100.txtpb")
# A line of XLA's listing: indentation, number and kind of what is launched.
LINE = re.compile(r"^(?P<indent> *)\d+: k(?P<kind>\w+)")
HOLDERS = ("CommandBuffer", "While", "Conditional", "Sequential", "AsyncStart", "AsyncDone", "DynamicSliceFusion")
# Calls of a program without a loop that are timed together.
CALLS = 500


@dataclasses.dataclass(frozen=True)
class Flags(harness.TimedFlags):
    batch_size: int = 64  # Examples in a step.
    lanes: int = 64  # Models of the program that trains many together.
    target: Annotated[Path, tyro.conf.arg(metavar="FILE")] = H100  # The GPU to compile for where there is none.


class Launches(NamedTuple):
    """Kernels and copies, and what the host launches for them: a command buffer is one."""

    kernels: int
    by_host: int


def count(listing: str) -> Launches:
    """Count what the innermost loop of a program launches, or the program itself if there is no loop.

    The listing is XLA's thunk_sequence.txt: one line per launch, indented by what holds it.

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
    found = [match for line in listing.rpartition("body:")[2].splitlines() if (match := LINE.match(line))]
    if not found:
        raise ValueError("XLA listed no launches; this version of XLA may list them otherwise")
    top = len(found[0]["indent"])
    # Further out again, what follows is launched after the loop.
    inside = list(itertools.takewhile(lambda match: len(match["indent"]) >= top, found))
    kernels = sum(match["kind"] not in HOLDERS for match in inside)
    return Launches(kernels, sum(len(match["indent"]) == top for match in inside if match["kind"] != "AsyncDone"))


def devices(target: Path) -> tuple[Any, str]:
    """Return the GPU to compile for, and its name; raise ValueError where JAX cannot compile for GPUs."""
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


def examples(n: int, key: jax.Array) -> Batch:
    return Batch(jax.random.bits(key, (n, 28, 28), jnp.uint8), jax.random.randint(key, (n,), 0, 10))


class Program:
    """A program compiled for the GPU, with the launches of a pass of its loop; it runs where there is a GPU."""

    def __init__(
        self, function: Callable[..., Any], make: Callable[..., Any], *, models=1, steps=1, a_pass=1, **options
    ):
        self.models, self.steps = models, steps
        self.state, *self.others = make()
        with tempfile.TemporaryDirectory() as dumped:
            lowered = jax.jit(function).lower(self.state, *self.others)
            self.executable = lowered.compile(compiler_options={"xla_dump_to": dumped, **options})
            # The second is there if command buffers changed the first.
            listings = sorted(Path(dumped).glob("*thunk_sequence*.txt"), key=lambda path: "after" in path.name)
            launches = count(listings[-1].read_text() if listings else "")
        self.kernels, self.by_host = (number / a_pass for number in launches)

    def run(self) -> None:
        for _ in range(CALLS if self.steps == 1 else 1):
            # From the state that the run before left, as in `fit`.
            self.state, _ = self.executable(self.state, *self.others)
        jax.block_until_ready(self.state)


def compile_all(flags: Flags, target: Any) -> dict[str, Program]:
    """Compile all programs, by name."""
    config, steps = TrainConfig(batch_size=flags.batch_size), -(-IMAGES // flags.batch_size)
    sharding = NamedSharding(Mesh(np.array(target), ("gpus",)), PartitionSpec())

    def made(make: Callable[[], Any]) -> Any:
        """Make the inputs of a program; where it cannot run, their shapes will do."""
        if jax.default_backend() == "gpu":
            return jax.jit(make)()
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), jax.eval_shape(make))

    def inputs(config: TrainConfig = config, n: int = IMAGES, lanes: int = 0) -> Any:
        key = jax.random.key(0)
        keys, start = (jax.random.split(key, lanes), jax.vmap) if lanes else (key, lambda function: function)
        return start(partial(init_state, config=config))(keys), examples(n, key), keys

    def epoch(config: TrainConfig = config, unroll: int = 1, **options: Any) -> Program:
        with harness.replaced((jax.lax, "scan", partial(jax.lax.scan, unroll=unroll))):
            function = partial(train_epoch, config=config, dropout_rate=0.2)
            return Program(function, partial(made, partial(inputs, config)), steps=steps, a_pass=unroll, **options)

    step, train = (partial(function, config=config, dropout_rate=0.2) for function in (train_step, train_epoch))
    together, n = jax.vmap(train, (0, None, 0)), flags.batch_size
    programs = {
        "the epoch of `fit`": epoch(),
        "without command buffers": epoch(xla_gpu_enable_command_buffer=""),
        "kernels of a command buffer side by side": epoch(xla_gpu_command_buffer_scheduling_mode="CONCURRENT"),
        "products by cuBLAS alone": epoch(xla_gpu_enable_triton_gemm=False),
        "two steps a pass of the loop": epoch(unroll=2),
        "without Adam (plain gradient descent)": epoch(dataclasses.replace(config, optimizer=optax.sgd)),
        "one jitted step at a time": Program(step, partial(made, partial(inputs, n=n))),
        f"{flags.lanes} models together": Program(
            together, partial(made, partial(inputs, lanes=flags.lanes)), steps=steps, models=flags.lanes
        ),
    }
    with harness.replaced(NO_RANDOM_NUMBERS):
        return programs | {"without dropout's random numbers": epoch()}


def main(flags: Flags) -> None:
    target, about = devices(flags.target)
    programs, seconds = compile_all(flags, target), {}
    if jax.default_backend() == "gpu":
        seconds = harness.alternate({name: program.run for name, program in programs.items()}, flags.repetitions)
    rows: list[harness.Row] = []
    for name, program in programs.items():
        row: harness.Row = {"program": name, "kernels a step": program.kernels}
        row |= {"launched by the host a step": program.by_host}
        if name in seconds:
            row |= harness.spread(seconds[name])
            steps = program.models * (program.steps if program.steps > 1 else CALLS)
            row["us a step and model"] = 1e6 * row["median (s)"] / steps
        rows.append(row)
    flags = dataclasses.replace(flags, target=Path(flags.target.name))
    harness.write("kernels", rows, flags=flags, compiled_for=about)


if __name__ == "__main__":
    harness.start(main, Flags, __doc__)
