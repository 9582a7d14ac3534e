"""Ctrl-C and SIGTERM: who takes note of them, and who does not."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fashion_jax.signals import noting_signals

ROOT = Path(__file__).parents[1]


def run_code(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_a_noted_sigterm_ends_the_process_where_the_outermost_block_ends():
    code = """
import signal
from fashion_jax.signals import noting_signals
with noting_signals(terminate=True) as noted:
    with noting_signals(terminate=True):
        signal.raise_signal(signal.SIGTERM)
        print("inner", flush=True)
    print("outer", noted == [signal.SIGTERM], flush=True)
print("after", flush=True)
"""
    result = run_code(code)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "inner\nouter True\n"), result.stderr


def test_without_a_checkpoint_sigterm_ends_a_run_at_once():
    code = """
import signal, jax, numpy as np
from fashion_jax import Batch, TrainConfig, fit
data = Batch(np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.int32))
def terminate(end):
    print("reported", flush=True)
    signal.raise_signal(signal.SIGTERM)
    print("went on", flush=True)
fit(data, data, key=jax.random.key(0), config=TrainConfig(hidden=(8,)), epochs=2, on_epoch=terminate)
"""
    result = run_code(code)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "reported\n"), result.stderr


@pytest.mark.usefixtures("interruptible")
def test_other_threads_and_other_handlers_are_left_alone():
    def look() -> list[int]:
        before = signal.getsignal(signal.SIGINT)
        with noting_signals(terminate=True) as noted:
            assert signal.getsignal(signal.SIGINT) is before
        return noted

    with ThreadPoolExecutor() as threads:
        assert threads.submit(look).result() == []
    signal.signal(signal.SIGINT, lambda number, frame: None)
    look()


def test_a_second_sigterm_does_not_interrupt_and_a_ctrl_c_after_it_does():
    """A parent such as make passes a SIGTERM on that its group has received already."""
    code = """
import signal
from fashion_jax.signals import noting_signals
signal.signal(signal.SIGINT, signal.default_int_handler)
with noting_signals(terminate=True):
    for number in (signal.SIGTERM, signal.SIGTERM):
        signal.raise_signal(number)
    print("goes on", flush=True)
    signal.raise_signal(signal.SIGINT)
    print("went on", flush=True)
"""
    result = run_code(code)
    assert (result.returncode, result.stdout, result.stderr) == (
        -signal.SIGTERM,
        "goes on\n",
        "interrupted after a SIGTERM, which ends the process now\n",
    )
