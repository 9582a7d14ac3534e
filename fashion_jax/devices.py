"""Place lanes on devices, run them there, and fetch the results.

Lanes are sharded over the devices. A CPU device trains its lanes one after the other, which keeps a network in its
core's cache; an accelerator trains many at once.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fashion_jax import _model_checks
from fashion_jax.config import TrainConfig

LANES = PartitionSpec("lanes")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
# Fraction of an accelerator's memory that lanes may take; the rest is for the data and for XLA's own needs.
MEMORY_SHARE = 0.5
# On Intel's processors LLVM would leave half of each vector register unused.
COMPILER_OPTIONS: dict[str, bool | str] = {"xla_cpu_prefer_vector_width": "512"}
# Seconds after which a silent process counts as dead.
HEARTBEAT_SECONDS = 30


def use_all_cores() -> None:
    """Create one JAX CPU device for each core that this process may use; call it before the first JAX operation.

    It does nothing on a machine with an accelerator.

    Raises:
        RuntimeError: JAX has already started with a different number of devices.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    # A container's quota, such as "150000 100000" for one and a half cores; "max" is none.
    with contextlib.suppress(OSError, ValueError):
        quota, period = map(int, CPU_QUOTA.read_text().split())
        cores = min(cores, max(1, quota // period))
    jax.config.update("jax_num_cpu_devices", cores)


def join_machines(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Connect this process with others that train together; call it before the first JAX operation.

    Args:
        coordinator: host:port of process 0. Without it JAX asks the launcher: SLURM, Open MPI or Cloud TPU.
        processes: Number of processes.
        process: Index of this one, from 0.

    Raises:
        ValueError: Only some of the three are given, or there is no launcher to ask.
    """
    given = [value is not None for value in (coordinator, processes, process)]
    if any(given) and not all(given):
        raise ValueError(
            f"coordinator, processes and process belong together, got {coordinator!r}, {processes!r} and {process!r}"
        )
    try:
        jax.distributed.initialize(coordinator, processes, process, heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
    except ValueError as error:  # The launcher's variables are missing, or only some of them are set.
        if any(given):
            raise
        raise ValueError(
            f"start with srun or mpirun, or pass coordinator, processes and process; JAX found no launcher: {error}"
        ) from error


@contextlib.contextmanager
def remembered_interrupts() -> Iterator[list[int]]:
    """Yield a list that holds an entry for each Ctrl-C, beside the KeyboardInterrupt.

    Python ignores the exception in some places, such as JAX's callback for garbage collection. A handler of the user's
    own is left alone.
    """
    pressed: list[int] = []

    def handle(number: int, frame: Any) -> None:
        pressed.append(number)
        signal.default_int_handler(number, frame)

    default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    replaced = default and threading.current_thread() is threading.main_thread()
    try:
        if replaced:
            signal.signal(signal.SIGINT, handle)
        yield pressed
    finally:
        if replaced:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Lanes:
    """Runs on their devices: applies a function of one run to all, a few at once on each device.

    Args:
        lanes: Key and hyperparameters of each run.
        data: NumPy arrays that every run sees.
        config: Static.
        devices: Where to run.
        at_once: How many runs a device trains at the same time; as many as fit if None.
    """

    def __init__(
        self, lanes: Sequence[tuple[Any, Any]], data: Any, config: TrainConfig, devices: Any, at_once: int | None
    ):
        implementation = jax.random.key_impl(lanes[0][0])
        if at_once is None:
            # Other generators draw differently for several runs at once than for each alone.
            threefry = str(implementation) == "threefry2x32"
            at_once = lanes_that_fit(devices[0], config, data[0].images.shape[1:]) if threefry else 1
        self._mesh = Mesh(np.array(devices), ("lanes",), axis_types=(AxisType.Auto,))
        self.lanes: Sequence[Any] = lanes
        self.data: Any = data
        self.config: TrainConfig = config
        # One of several processes writes what all of them have trained.
        self.writes: bool = not self._mesh.is_multi_process or jax.process_index() == 0
        self._at_once = min(at_once, -(-len(lanes) // self._mesh.size))
        key_data = self.place(np.stack([np.asarray(jax.random.key_data(key)) for key, _ in lanes]))
        names, dtype = lanes[0][1], jnp.result_type(float)
        numbers = self.place({name: np.array([lane[name] for _, lane in lanes], dtype) for name in names})
        self._runs = (jax.random.wrap_key_data(key_data, impl=implementation), numbers)
        # A copy, because a CPU device may use a NumPy array where it lies, and the caller may change it.
        self._shared = self._replicate(jax.tree.map(np.array, data))

    def map(self, function: Callable[..., Any], carry: Any = None, turn: Any = None) -> Any:
        """Apply `function(key, hyperparameters, carry, turn, data, config=config)` to every run.

        Args:
            function: Pure, and the same object at every call.
            carry: Arrays [lanes, ...] on the devices.
            turn: NumPy scalars that all runs share, beside the data.

        Returns:
            Arrays [lanes, ...] on the devices.
        """
        shared = (self._replicate(turn), self._shared)
        static = {"config": self.config, "mesh": self._mesh, "at_once": self._at_once}
        return _map(function, (*self._runs, carry), shared, **static)

    def place(self, tree: Any) -> Any:
        """Shard NumPy arrays [lanes, ...] over the devices; to fill up the last one, runs are repeated."""
        filled = -(-len(self.lanes) // self._mesh.size) * self._mesh.size
        return jax.tree.map(lambda leaf: self._put(np.resize(leaf, (filled, *leaf.shape[1:])), LANES), tree)

    def fetch(self, tree: Any) -> Any:
        """Return NumPy arrays [lanes, ...]."""
        if self._mesh.is_multi_process:
            from jax.experimental import multihost_utils

            tree = multihost_utils.process_allgather(tree, tiled=True)
        # Waits in Python, where Ctrl-C is heard at once.
        leaves: list[Any] = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "is_ready")]
        while not all(leaf.is_ready() for leaf in leaves):
            time.sleep(0.0005)
        return jax.tree.map(lambda leaf: leaf[: len(self.lanes)], jax.device_get(tree))

    def digest(self, function: Callable[..., Any], carry: Any, turn: Any) -> str:
        """Return the SHA-256 of a function of one run as the compiler receives it, on any number of devices."""
        # How much of the data is evaluated at once may change.
        config = dataclasses.replace(self.config, eval_batch_size=TrainConfig.eval_batch_size)
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), (*self._runs, carry))
        data = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self._shared)
        traced = jax.jit(function, static_argnames="config").trace(*one, turn, data, config=config)
        return hashlib.sha256(traced.lower(lowering_platforms=("cpu",)).as_text().encode()).hexdigest()

    def _replicate(self, tree: Any) -> Any:
        return jax.tree.map(lambda leaf: self._put(leaf, PartitionSpec()), tree)

    def _put(self, array: Any, spec: PartitionSpec) -> jax.Array:
        # Every process holds the whole array.
        return jax.make_array_from_callback(array.shape, NamedSharding(self._mesh, spec), lambda index: array[index])


@functools.partial(
    jax.jit, static_argnames=("function", "config", "mesh", "at_once"), compiler_options=COMPILER_OPTIONS
)
def _map(function, lanes, shared, *, config: TrainConfig, mesh: Mesh, at_once: int):
    def on_device(lanes, shared):
        def one(lane):
            return function(*lane, *shared, config=config)

        return jax.lax.map(one, lanes, batch_size=None if at_once == 1 else at_once)

    specs = {"in_specs": (LANES, PartitionSpec()), "out_specs": LANES}
    return jax.shard_map(on_device, mesh=mesh, check_vma=False, **specs)(lanes, shared)


def lanes_that_fit(device: Any, config: TrainConfig, image_shape: tuple[int, ...]) -> int:
    """Estimate how many lanes a device should train at once: 1 on a CPU, as many as fit into the memory of others.

    >>> lanes_that_fit(jax.devices("cpu")[0], TrainConfig(), (28, 28))
    1
    """
    if device.platform == "cpu":
        return 1
    variables = _model_checks.variable_shapes(config.model, image_shape)

    def outputs(variables):
        images = jnp.zeros((1, *image_shape), jnp.uint8)
        captured: Any = {"capture_intermediates": True, "mutable": ["intermediates"]}
        return config.model.apply(variables, images, deterministic=True, **captured)

    count, per_image = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (variables, jax.eval_shape(outputs, variables))
    )
    # Parameters, two moments and the best parameters, old and new of each, and a gradient; outputs, forward and back.
    activations = 2 * (math.prod(image_shape) + per_image) * config.batch_size + per_image * config.eval_batch_size
    memory = (device.memory_stats() or {}).get("bytes_limit", 8 * 2**30)
    return max(1, int(MEMORY_SHARE * memory / (4 * (9 * count + activations))))
