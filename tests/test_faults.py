"""Processes that die, disks that are full, directories that are taken, Ctrl-C: the same bytes, or a clear error.

Processes, signals, locks and limits are real.
"""

import functools
import itertools
import logging
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import sweep_worker
from sweep_worker import CONFIG, ROOT, equal, parts

from fashion_jax import FashionMLP, TrainConfig
from fashion_jax.checkpoint import Store
from fashion_jax.devices import Lanes
from fashion_jax.train import fit, sweep

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and forks of POSIX")
KEY = jax.random.key(1)
NUMBERS = {"dropout_rate": 0.2, "learning_rate": 0.02}
OPTIONS = {"key": KEY, "config": CONFIG, **NUMBERS}


@pytest.fixture(scope="module")
def data(small, splits):
    return parts(small, splits)


def start(code: str, *arguments) -> subprocess.Popen:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, text=True, **pipes)


# Processes that die

# When all is written, before it gets its name, while old files are removed, and some milliseconds after an epoch.
FIT = {"key": 1, **NUMBERS, "epochs": 12}, [("fsync", 2), ("epoch", 2), ("replace", 3), ("unlink", 5)]
SWEEP = {"seeds": [0, 5], "dropout_rate": [0.0, 0.2], "epochs": 12}, [("replace", 2), ("epoch", 2)]


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_bytes(data, tmp_path):
    """Each time it resumes in a process of its own; the last part is trained here."""
    np.savez(tmp_path / "data.npz", *data[0], *data[1])

    def die(name, arguments, deaths) -> None:
        arguments = arguments | {"checkpoint": str(tmp_path / name)}
        for number, (death, at) in enumerate(deaths):
            options = {"data": tmp_path / "data.npz", "arguments": arguments, "die_in": death, "die_at": at}
            (process,) = sweep_worker.run(options)
            expected = -signal.SIGALRM if death == "epoch" else -signal.SIGKILL
            assert process.returncode == expected, process.stderr
            assert ("resuming after epoch" in process.stderr) == (number > 0)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(die, ("fit", "sweep"), *zip(FIT, SWEEP, strict=True)))
    ends = []
    run = fit(*data, **OPTIONS, epochs=12, checkpoint=tmp_path / "fit", callbacks=[ends.append])
    assert 3 < ends[0].epoch <= 12
    equal(run, fit(*data, **OPTIONS, epochs=12))
    equal(*(sweep(*data, config=CONFIG, **SWEEP[0], checkpoint=place) for place in (tmp_path / "sweep", None)))
    assert not list(tmp_path.glob("*/.*"))


HOLDING = """
import os, sys, warnings
from fashion_jax.checkpoint import Store
warnings.simplefilter("ignore")
with Store(sys.argv[1], identity={}):
    if sys.argv[2] == "fork" and os.fork() == 0:
        sys.stdin.readline()
        os._exit(0)
    print("locked", flush=True)
    if sys.argv[2] == "wait":
        sys.stdin.readline()
"""


def test_a_directory_is_of_one_run_while_it_lives(tmp_path):
    taken = functools.partial(
        pytest.raises, BlockingIOError, match=f"^another run is saving to {tmp_path}; wait for it"
    )
    store = functools.partial(Store, tmp_path, identity={})
    with store(), taken():
        store()
    with pytest.raises(ZeroDivisionError), store():
        raise ZeroDivisionError
    with start(HOLDING, tmp_path, "wait") as process:
        assert process.stdout.readline() == "locked\n"
        with taken():
            store()
        process.kill()
        process.wait()
        with store():
            pass
    # A child that it has forked lives on.
    with start(HOLDING, tmp_path, "fork") as process:
        assert process.stdout.readline() == "locked\n"
        assert process.wait() == 0
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


# Ctrl-C


@pytest.fixture
def interruptible():
    """Python's own handler: a shell lets what it starts in the background ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_returns_the_run_so_far(data, tmp_path, caplog):
    def interrupt(end):
        if end.epoch == 4:
            signal.raise_signal(signal.SIGINT)

    with caplog.at_level(logging.INFO, logger="fashion_jax"):
        for place in (None, tmp_path):
            run = fit(*data, **OPTIONS, epochs=5, callbacks=[interrupt], checkpoint=place)
            equal(run, fit(*data, **OPTIONS, epochs=4))
        run = fit(*data, **OPTIONS, epochs=5, callbacks=[interrupt], checkpoint=tmp_path)
    equal(run, fit(*data, **OPTIONS, epochs=5))
    assert caplog.messages == [
        "interrupted after epoch 4 of 5; with checkpoint=DIRECTORY the same call would resume from there",
        f"interrupted after epoch 4 of 5; the same call resumes from {tmp_path}",
        "resuming after epoch 4 of 5",
    ]


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_before_the_first_epoch_raises(data, caplog):
    def augment(key, images):
        signal.raise_signal(signal.SIGINT)  # While the program is compiled.

    with pytest.raises(KeyboardInterrupt):
        fit(*data, key=KEY, config=TrainConfig(model=FashionMLP(hidden=()), augment=augment))
    assert not caplog.messages


def test_ctrl_c_in_any_line_loses_no_epoch(data, tmp_path, monkeypatch):
    """In each line of the loop in turn: the complete epochs are returned and saved, and a resume ends as ever."""
    # The same for all of these runs, and slow.
    monkeypatch.setattr(Lanes, "digest", lambda *_: "program")
    whole, returned = [fit(*data, **OPTIONS, epochs=epochs) for epochs in (1, 2)], []
    for place in itertools.count(1):
        lines = itertools.count(1)

        def trace(frame, event, _, lines=lines, place=place):
            if event == "line" and next(lines) == place:
                raise KeyboardInterrupt
            return trace if event == "line" or frame.f_code.co_name == "_run_epochs" else None

        sys.settrace(trace)
        try:
            run = fit(*data, **OPTIONS, epochs=2, checkpoint=tmp_path / str(place))
        except KeyboardInterrupt:
            run = None
        finally:
            sys.settrace(None)
        if run:
            returned.append(len(run.history.running_loss))
            equal(run, whole[returned[-1] - 1])
        equal(fit(*data, **OPTIONS, epochs=2, checkpoint=tmp_path / str(place)), whole[1])
        if next(lines) <= place:
            break
    assert returned == sorted(returned)
    assert min(map(returned.count, (1, 2))) > 5


# Disks and directories


def test_a_full_disk_leaves_the_checkpoints_before(data, tmp_path):
    """A limit on the size of files stands for it."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(end):
        if end.epoch == 3:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))

    try:
        with pytest.raises(OSError, match=r"File too large; not written, an existing file is intact: .*epoch-00003"):
            fit(*data, **OPTIONS, epochs=5, checkpoint=tmp_path, callbacks=[fill])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name[:11] for path in tmp_path.iterdir()} == {"epoch-00001", "epoch-00002", "lock"}
    equal(fit(*data, **OPTIONS, epochs=5, checkpoint=tmp_path), fit(*data, **OPTIONS, epochs=5))


def test_places_that_hold_no_checkpoints_are_named(data, tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path / "file", tmp_path / "file" / "deeper", "/proc/fashion_jax"):
        with pytest.raises(OSError, match=str(place)):
            fit(*data, **OPTIONS, epochs=1, checkpoint=place)
    assert (tmp_path / "file").read_text() == "mine"
