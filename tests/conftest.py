import contextlib
import gzip
import hashlib
import logging
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import zlib
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import jax
import jaxtyping
import pytest
from sources import idx_bytes

from fashion_jax import Run, data, fit, sweep

# PyTorch's threads spin while they wait for each other: beside another worker, longer than they work.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Silent broadcasting between ranks hides mistakes: a loss of shape [n, n] still averages to a number.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Let the processes that the tests of one worker start share what they compile, which is most of their time.

    Not those of all workers: JAX writes an entry in place, and who reads half of one warns. This process has read its
    environment already.
    """
    shared = tmp_path_factory.getbasetemp() / "compiled"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(shared))
        patch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        yield
    # Half an entry stays for good, and fails whichever test reads it.
    damaged = [entry.name for entry in shared.glob("*-cache") if not is_whole(entry.read_bytes())]
    assert not damaged, f"a process that was killed, or could not write, needs compiled_apart: {damaged}"


def is_whole(compressed: bytes) -> bool:
    with contextlib.suppress(zlib.error):
        zlib.decompress(compressed)
        return True
    return False


@pytest.fixture
def compiled_apart(monkeypatch):
    """Share nothing with processes that are killed or cannot write, which leave half an entry."""
    monkeypatch.setenv("JAX_ENABLE_COMPILATION_CACHE", "false")


@pytest.fixture(scope="session")
def splits() -> data.Splits:
    """The real data set; `make data` has put it where `load` finds it."""
    return data.load()


@pytest.fixture(scope="session")
def small(splits) -> data.Batch:
    """A thousand real images; no multiple of the batch size of 64."""
    return data.subset(splits.train, 1_000, key=jax.random.key(7))


@pytest.fixture(scope="session")
def trained(splits) -> Run:
    """A network that has learned something, with dropout 0.2, from 10,000 images."""
    part = data.subset(splits.train, 10_000, key=jax.random.key(7))
    return fit(part, splits.test, key=jax.random.key(0), dropout_rate=0.2, epochs=3)


@pytest.fixture
def interruptible():
    """Python's own handler of Ctrl-C: a shell lets what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def unchecked():
    """Switch the run-time check of annotations off, which only the tests have, to see the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def call(monkeypatch, capsys, caplog, unchecked):
    """Run a script as `python SCRIPT FLAGS` would, in this process, where the imports are there already.

    For flags that end it before it trains: this process has its one device already, and pytest takes the log.
    """

    def run(script: Path, *flags) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, flags)])
        monkeypatch.setattr(sweep, "use_all_cores", lambda: None)
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("TERM", "xterm")
        # As it was afterwards, whatever level the script gives it.
        caplog.set_level(logging.INFO, "fashion_jax")
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(script), run_name="__main__")
        out, errors = capsys.readouterr()
        code = caught.value.code
        # Python prints what is no number, and exits with 1.
        if isinstance(code, str):
            code, errors = 1, f"{errors}{code}\n"
        return subprocess.CompletedProcess(sys.argv, code or 0, out, errors)

    return run


@pytest.fixture(scope="session")
def idx_dir(splits, tmp_path_factory) -> Path:
    """The four files, uncompressed; their bytes are the published ones."""
    directory = tmp_path_factory.mktemp("idx")
    for name, array in zip(data.DIGESTS, (*splits.train, *splits.test), strict=True):
        (directory / name).write_bytes(idx_bytes(array))
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == data.DIGESTS[name]
    return directory


@pytest.fixture(scope="session")
def gzip_dir(idx_dir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("gzip")
    for name in data.DIGESTS:
        (directory / f"{name}.gz").write_bytes(gzip.compress((idx_dir / name).read_bytes(), compresslevel=1))
    return directory


class Host(NamedTuple):
    """A host like the data set's own, and what it was asked for."""

    url: str
    requests: list[str]


@pytest.fixture(scope="session")
def server(gzip_dir):
    requests: list[str] = []

    class Noting(SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append(self.requestline)

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Noting, directory=gzip_dir)) as host:
        threading.Thread(target=host.serve_forever, daemon=True).start()
        yield Host(f"http://127.0.0.1:{host.server_port}/", requests)
        host.shutdown()


@pytest.fixture
def copy(idx_dir, tmp_path) -> Path:
    """A copy of the files to spoil."""
    directory = tmp_path / "copy"
    directory.mkdir()
    for name in data.DIGESTS:
        (directory / name).hardlink_to(idx_dir / name)
    return directory


@pytest.fixture
def nothing(monkeypatch, tmp_path):
    """A user who has no data anywhere, and no network."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for variable in ("XDG_CACHE_HOME", "TFDS_DATA_DIR", data.DATA_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(data, "DEBIAN_DIR", tmp_path / "debian")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setattr(data, "URL", f"http://127.0.0.1:{closed.getsockname()[1]}/")
    return tmp_path
