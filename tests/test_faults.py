"""Processes that die, disks that are full, directories that are taken, Ctrl-C: the same bytes, or a clear error.

Processes, signals, locks and limits are real.
"""

import contextlib
import functools
import inspect
import itertools
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import sweep_worker
from sweep_worker import LINEAR, ROOT, equal

from fashion_jax import train
from fashion_jax.checkpoint import Store
from fashion_jax.train import fit, sweep

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and forks of POSIX")
OPTIONS = {"key": jax.random.key(1), "config": LINEAR}


def start(code: str, *arguments) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True, **pipes)


# When all is written, while old files are removed; before a file gets its name, after an epoch.
FIT = {"key": 1, "epochs": 12}, [("fsync", 2), ("unlink", 5)]
SWEEP = {"seeds": [0, 5], "learning_rate": [0.001, 0.01], "epochs": 12}, [("replace", 3), ("epoch", 2)]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(data, tmp_path):
    """Each time it resumes in a process of its own; the last part is trained here."""
    np.savez(tmp_path / "data.npz", *data[0], *data[1])

    def die(name, arguments, deaths) -> None:
        arguments = arguments | {"checkpoint": tmp_path / name}
        for number, (death, at) in enumerate(deaths):
            options = {"data": tmp_path / "data.npz", "arguments": arguments, "die_in": death, "die_at": at}
            (process,) = sweep_worker.run(options)
            assert process.returncode == -signal.SIGKILL, process.stderr
            assert ("resuming after epoch" in process.stderr) == (number > 0)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(die, ("fit", "sweep"), *zip(FIT, SWEEP, strict=True)))
    equal(*(fit(*data, **OPTIONS, epochs=12, checkpoint=place) for place in (tmp_path / "fit", None)))
    equal(*(sweep(*data, config=LINEAR, **SWEEP[0], checkpoint=place) for place in (tmp_path / "sweep", None)))
    assert not list(tmp_path.glob("*/.*"))


HOLDING = """
import os, sys, warnings
from fashion_jax.checkpoint import Store
warnings.simplefilter("ignore")
with Store(sys.argv[1], identity={}):
    print("locked", flush=True)
    sys.stdin.readline()
    if os.fork() == 0:
        sys.stdin.read()
        os._exit(0)
"""


def test_a_directory_is_of_one_run_while_it_lives(tmp_path):
    taken = functools.partial(pytest.raises, BlockingIOError, match=f"^another run is saving to {tmp_path}; wait")
    store = functools.partial(Store, tmp_path, identity={})
    with store(), taken(), store():
        pass
    with start(HOLDING, tmp_path) as process:
        assert process.stdout.readline() == "locked\n"
        with taken(), store():
            pass
        print(file=process.stdin, flush=True)
        assert process.wait() == 0
        # A child that it has forked lives on.
        with store():
            pass


OUTLIVING = """
import sys
sys.modules["fcntl"] = None  # As on Windows.
import threading, warnings
warnings.filterwarnings("error")
warnings.filterwarnings("ignore", "only soft file lock")
import jax, numpy as np
from fashion_jax import Batch, FashionMLP, TrainConfig, fit
jax.config.update("jax_enable_compilation_cache", False)  # It has a lock of its own.
data = Batch(np.zeros((100, 28, 28), np.uint8), np.arange(100) % 10)
def train():
    threading.main_thread().join()
    config = TrainConfig(model=FashionMLP(hidden=()))
    run = fit(data, data, key=jax.random.key(0), config=config, epochs=3, checkpoint=sys.argv[1])
    print(len(run.history.running_loss), flush=True)
threading.Thread(target=train).start()
"""


def test_a_run_may_outlive_the_main_thread_and_needs_no_fcntl(tmp_path):
    out, errors = start(OUTLIVING, tmp_path).communicate(timeout=300)
    assert (out, errors) == ("3\n", "")
    assert len(list(tmp_path.glob("epoch-*"))) >= 2


# Python ignores it in some places, such as JAX's callback for garbage collection.
@pytest.mark.parametrize("ignored", [(), (KeyboardInterrupt,)])
def test_ctrl_c_returns_the_run_so_far_without_checkpoints_too(data, caplog, ignored):
    def interrupt(end):
        with contextlib.suppress(*ignored):
            if end.epoch == 4:
                signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    equal(fit(*data, **OPTIONS, epochs=5, callbacks=[interrupt]), fit(*data, **OPTIONS, epochs=4))
    advice = "with checkpoint=DIRECTORY the same call would resume from there"
    assert caplog.messages == [f"interrupted after epoch 4 of 5; {advice}"]
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_ctrl_c_in_any_line_returns_and_saves_complete_epochs(data, tmp_path):
    """Before the first epoch and while the last one is saved it raises. The directory is free again."""
    functions = [train._run_epochs, Store.__enter__, Store.save, Store._start_writing, Store._wait]
    codes = {inspect.unwrap(function).__code__ for function in functions}
    expected, complete = [None, *(fit(*data, **OPTIONS, epochs=epochs) for epochs in (1, 2))], []
    for place in itertools.count(1):
        run, lines, directory = None, itertools.count(1), tmp_path / str(place)

        def trace(frame, event, _, lines=lines, place=place):
            if event == "line" and next(lines) == place:
                raise KeyboardInterrupt
            return trace if frame.f_code in codes else None

        sys.settrace(trace)
        with contextlib.suppress(KeyboardInterrupt):
            run = fit(*data, **OPTIONS, epochs=2, checkpoint=directory)
        sys.settrace(None)
        complete.append(len(run.history.running_loss) if run else 0)
        if run:
            equal(run, expected[complete[-1]])
            assert len(list(directory.glob("epoch-*"))) == complete[-1]
        with Store(directory, identity={}):
            pass
        if next(lines) <= place:
            break
    assert re.fullmatch("0{5,}1{5,}2{2,}0{5,}2", "".join(map(str, complete)))


def test_a_full_disk_leaves_the_checkpoints_before(data, tmp_path):
    """A limit on the size of files stands for it."""
    import resource

    fit(*data, **OPTIONS, epochs=2, checkpoint=tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"File too large; not written, an existing file is intact: .*epoch-00003"):
            fit(*data, **OPTIONS, epochs=5, checkpoint=tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name[:11] for path in tmp_path.iterdir()} == {"epoch-00001", "epoch-00002", "lock"}
    equal(*(fit(*data, **OPTIONS, epochs=5, checkpoint=place) for place in (tmp_path, None)))
