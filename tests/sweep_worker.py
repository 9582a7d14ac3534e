"""One process of a sweep on forced CPU devices; `test_sweep.py` starts one or several.

Usage: sweep_worker.py DEVICES OUTPUT [COORDINATOR PROCESSES PROCESS]
"""

import logging
import os
import signal
import sys

import jax
import numpy as np

from fashion_jax import TrainConfig, data
from fashion_jax import sweep as sweeps
from fashion_jax.sweep import join_machines, sweep

SEEDS, RATES, EPOCHS = (0, 3, 4), (0.0, 0.5), 2


def main(devices: str, output: str, *machines: str) -> None:
    jax.config.update("jax_num_cpu_devices", int(devices))
    if machines:
        coordinator, processes, process = machines
        # So that a test need not wait for long; a busy machine's processes keep to it.
        sweeps.HEARTBEAT_SECONDS = 10
        join_machines(coordinator, int(processes), int(process))
    train, test = data.load()
    train, validation = (data.subset(part, 1_000, key=jax.random.key(7)) for part in (train, test))

    def on_epoch(end):
        if os.environ.get("STOP"):
            raise KeyboardInterrupt
        if end.epoch == 1 and os.environ.get("DIE") == str(jax.process_index()):
            os.kill(os.getpid(), signal.SIGKILL)

    config = TrainConfig(hidden=(int(os.environ["HIDDEN"]),)) if "HIDDEN" in os.environ else TrainConfig()
    options = {"seeds": SEEDS, "dropout_rates": RATES, "epochs": EPOCHS, "checkpoint": os.environ.get("CHECKPOINT")}
    run = sweep(train, validation, config=config, on_epoch=on_epoch, **options)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves((run.history, run.state.params))]
    np.savez(output, *leaves)
    print(f"{jax.process_count()} processes, {jax.device_count()} devices", flush=True)


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fashion_jax").setLevel(logging.INFO)
    main(*sys.argv[1:])
