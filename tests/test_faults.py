"""Files, disks and hosts that fail: a correct result or a clear error, and nothing half-written.

Processes, limits, files and sockets are real. `tests/README.md` lists every fault, its test and the outcome.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from sources import idx_bytes, replace

from fashion_jax import Batch, TrainConfig, data, fit
from fashion_jax.checkpoint import Store
from fashion_jax.files import locked, prepare_directory, remove_partial, scratch_directory, write_atomically
from fashion_jax.log import Progress

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "compare_overfit.py"
IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = data.DIGESTS
# root may do everything; what a user may not do is tested as another user.
UNPRIVILEGED = """
import os
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""


def run_python(code: str, *arguments, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=120, **options)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Files


@pytest.fixture
def dead_writer(tmp_path) -> str:
    """The name of what a writer left that was killed between writing and renaming."""
    (tmp_path / "report.md").write_text("earlier")
    code = """
import os, signal, sys
from fashion_jax.files import write_atomically
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
write_atomically(sys.argv[1], "x" * 100_000)
"""
    assert run_python(code, tmp_path / "report.md").returncode == -signal.SIGKILL
    assert (tmp_path / "report.md").read_text() == "earlier"
    (left,) = set(names(tmp_path)) - {"report.md"}
    return left


@pytest.mark.parametrize("start", [prepare_directory, remove_partial, lambda path: write_atomically(path / "a", "a")])
def test_what_a_killed_writer_left_is_removed_at_the_next_start(dead_writer, tmp_path, start):
    assert (tmp_path / dead_writer).stat().st_size == 100_000
    start(tmp_path)
    assert dead_writer not in names(tmp_path)
    assert (tmp_path / "report.md").read_text() == "earlier"


def test_a_scratch_directory_of_a_killed_process_is_removed(tmp_path):
    code = """
import os, signal, sys
from fashion_jax.files import scratch_directory
with scratch_directory(sys.argv[1]) as scratch:
    (scratch / "deep").mkdir()
    (scratch / "deep" / "file").touch()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    run_python(code, tmp_path)
    assert len(names(tmp_path)) == 1
    with scratch_directory(tmp_path) as scratch:
        assert names(tmp_path) == [scratch.name]
    assert not names(tmp_path)


def test_what_a_living_writer_is_at_stays(tmp_path):
    code = """
import os, sys
from fashion_jax.files import write_atomically
def wait(descriptor):
    print("written", flush=True)
    sys.stdin.readline()
os.fsync = wait
write_atomically(sys.argv[1], "slow")
"""
    command = [sys.executable, "-c", code, str(tmp_path / "slow")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as writer:
        assert writer.stdout.readline() == "written\n"
        write_atomically(tmp_path / "fast", "fast")
        prepare_directory(tmp_path)
        assert len(names(tmp_path)) == 2
        writer.communicate("go on\n", timeout=60)
    assert writer.returncode == 0
    assert names(tmp_path) == ["fast", "slow"]
    assert (tmp_path / "slow").read_text() == "slow"


def test_files_that_only_look_similar_stay(tmp_path):
    others = [".env-production", "notes.partial", ".report.md-0123.partial", "report.md-01234567.partial"]
    for name in others:
        (tmp_path / name).touch()
    prepare_directory(tmp_path)
    assert names(tmp_path) == sorted(others)


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path):
    """Their clean-ups meet each other's temporary files at every stage."""
    code = """
import sys
from fashion_jax.files import write_atomically
for i in range(100):
    write_atomically(sys.argv[1], sys.argv[2] * 10_000)
"""
    path = tmp_path / "file"
    write_atomically(path, "0" * 10_000)
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), str(i)], cwd=ROOT) for i in range(4)]
    while any(writer.poll() is None for writer in writers):
        content = path.read_text()
        assert len(content) == 10_000
        assert len(set(content)) == 1
    assert [writer.returncode for writer in writers] == [0] * 4
    assert names(tmp_path) == ["file"]


def test_a_full_disk_leaves_the_earlier_file(tmp_path):
    code = """
import resource, sys
from fashion_jax.files import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_atomically(sys.argv[1], "x" * 1001)
except OSError as error:
    print(error)
write_atomically(sys.argv[1] + ".other", "x" * 1000)
"""
    path = tmp_path / "report.md"
    path.write_text("earlier")
    result = run_python(code, path)
    assert result.returncode == 0, result.stderr
    assert "File too large; this file was not written, and an earlier one is as it was" in result.stdout
    assert str(path) in result.stdout
    assert path.read_text() == "earlier"
    assert names(tmp_path) == ["report.md", "report.md.other"]


def test_the_lock_lets_one_in_at_a_time(tmp_path):
    code = """
import sys, time
from fashion_jax.files import locked
with locked(sys.argv[1]):
    print("in", flush=True)
    sys.stdin.readline()
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    order = []
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as other:
        assert other.stdout.readline() == "in\n"

        def wait():
            with locked(tmp_path):
                order.append("second")

        waiting = threading.Thread(target=wait)
        waiting.start()
        waiting.join(0.3)
        assert not order
        order.append("first")
        other.communicate("out\n", timeout=60)
        waiting.join(60)
    assert order == ["first", "second"]
    assert not names(tmp_path)


@pytest.fixture
def open_dir():
    """A directory that any user reaches; pytest's own are private."""
    with tempfile.TemporaryDirectory(prefix="fashion_jax-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)
        Path(directory).chmod(0o755)


def test_a_read_only_directory_is_named(open_dir):
    code = f"""
import sys
from fashion_jax.files import prepare_directory, write_atomically
{UNPRIVILEGED}
for write in (lambda path: write_atomically(path + "/report.md", "new"), prepare_directory):
    try:
        write(sys.argv[1])
    except PermissionError as error:
        print(error)
"""
    (open_dir / "report.md").write_text("earlier")
    open_dir.chmod(0o555)
    result = run_python(code, open_dir)
    assert result.returncode == 0, result.stderr
    written, prepared = result.stdout.splitlines()
    assert "Permission denied; this file was not written" in written
    assert f"{open_dir}/report.md" in written
    assert f"Permission denied; no files can be written into this directory: '{open_dir}'" in prepared
    assert (open_dir / "report.md").read_text() == "earlier"
    assert names(open_dir) == ["report.md"]


@pytest.mark.parametrize("below", ["", "deeper"])
def test_a_file_where_a_directory_should_be_is_named(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    place = tmp_path / "file" / below
    for write in (prepare_directory, lambda path: write_atomically(path / "report.md", "new")):
        with pytest.raises((FileExistsError, NotADirectoryError), match=str(place)):
            write(place)
    assert (tmp_path / "file").read_text() == "mine"


# What the examples write


def run_example(*flags, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, str(EXAMPLE), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


@pytest.mark.usefixtures("compiled_apart")
def test_the_example_on_a_full_disk_keeps_the_earlier_files(tmp_path):
    output = tmp_path / "größe 1 データ"
    output.mkdir()
    earlier = {"losses.png": b"earlier picture", "history.json": b"earlier history"}
    for name, content in earlier.items():
        (output / name).write_bytes(content)
    # Room for the figures of one epoch, and for no picture.
    code = """
import resource, runpy, sys
sys.argv = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    flags = ("--epochs", 1, "--seeds", 1, "--rates", 0.5, "--train-size", 500, "--output", output)
    result = run_python(code, EXAMPLE, *flags)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: [Errno 27] File too large; this file was not written")
    assert "losses.png" in result.stderr.splitlines()[-1]
    assert "| dropout 0.5" in result.stdout
    assert names(output) == ["history.json", "losses.png", "report.json", "report.md"]
    assert (output / "losses.png").read_bytes() == earlier["losses.png"]
    assert (output / "history.json").read_bytes() != earlier["history.json"]


@pytest.mark.parametrize("example", ["compare_overfit.py", "dropout_sweep.py"])
def test_an_output_directory_that_cannot_be_is_refused_before_training(tmp_path, call, example):
    (tmp_path / "file").touch()
    result = call(EXAMPLE.with_name(example), "--output", tmp_path / "file" / "out")
    assert result.returncode == 1
    assert "epoch 1" not in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: [Errno 20] Not a directory; no files can be written into")


# IDX files


def test_a_label_of_10_is_found(copy, nothing, splits):
    labels = np.array(splits.test.labels)
    labels[1234] = 10
    replace(copy / TEST_LABELS, idx_bytes(labels))
    with pytest.raises(ValueError, match=rf"{copy / TEST_LABELS}: .* found \[10000\] bytes from 0 to 10 with SHA-256"):
        data.load(copy)


def test_images_and_labels_that_are_swapped_are_named(copy, nothing):
    (copy / IMAGES).rename(copy / "other")
    (copy / LABELS).rename(copy / IMAGES)
    (copy / "other").rename(copy / LABELS)
    with pytest.raises(ValueError, match=f"{IMAGES}: expected .* found the content of {LABELS}"):
        data.load(copy)


def test_spaces_and_other_letters_in_paths_work(copy, nothing, capsys):
    place = copy.rename(copy.with_name("größe 1 データ"))
    assert data.main(["--data-dir", str(place)]) == 0
    assert "60,000" in capsys.readouterr().out


def test_a_shape_that_no_array_has_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes([0, 0, 8, 255]) + bytes(4) + b"\xff" * 4 * 254)
    with pytest.raises(ValueError, match=f"{path}: .* which no array can have"):
        data.read_idx(path)


# The cache


def test_a_file_where_the_cache_should_be_costs_only_the_cache(nothing, splits, caplog):
    (nothing / "home").mkdir()
    (nothing / "home" / ".cache").touch()
    data._fill_cache(splits)
    assert "the arrays were not cached, so the next load takes as long: [Errno 20] Not a directory" in caplog.text


def test_files_that_may_not_be_read(open_dir, idx_dir):
    """In the user's own cache they are passed over, in a directory that the user names they are an error."""
    cache = open_dir / ".cache" / "fashion_jax"
    cache.mkdir(parents=True)
    (cache / IMAGES).write_bytes(b"")
    debian = open_dir / "debian"
    debian.mkdir()
    for name in data.DIGESTS:
        (debian / name).write_bytes((idx_dir / name).read_bytes())
    cache.chmod(0o000)
    code = f"""
import os, sys
from pathlib import Path
import jax
from fashion_jax import data
{UNPRIVILEGED}
os.environ["HOME"], data.DEBIAN_DIR = sys.argv[1], Path(sys.argv[1]) / "debian"
print(data.load().train.images.shape)
try:
    data.load(sys.argv[1] + "/.cache/fashion_jax")
except PermissionError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XDG", "TFDS", "FASHION"))}
    result = run_python(code, open_dir, env=environment)
    cache.chmod(0o755)
    assert result.returncode == 0, result.stderr
    loaded, refused = result.stdout.splitlines()
    assert loaded == "(60000, 28, 28)"
    assert refused.startswith("[Errno 13] Permission denied")
    assert str(cache) in refused


# The network


@contextlib.contextmanager
def host(answer):
    """A host that treats each connection's request with `answer(connection, request)`."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=treat, args=(connection,), daemon=True).start()

        def treat(connection):
            with connection, contextlib.suppress(OSError):
                answer(connection, connection.recv(65536).decode())

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
        listening.shutdown(socket.SHUT_RDWR)


HEADER = b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\nConnection: close\r\n\r\n"


def half(connection, request):
    connection.sendall(HEADER)
    if request.startswith("GET"):
        connection.sendall(b"\x1f\x8b" + bytes(500_000))


def silence(connection, request):
    if request.startswith("HEAD"):
        connection.sendall(HEADER)
    else:
        connection.recv(1)


def half_and_silence(connection, request):
    half(connection, request)
    if request.startswith("GET"):
        connection.recv(1)


def drops(connection, request):
    connection.sendall(HEADER)
    while request.startswith("GET"):
        connection.sendall(b"\x1f")
        time.sleep(0.05)


def a_page(connection, request):
    connection.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
    if request.startswith("GET"):
        connection.sendall(b"<html>Log in to the network</html>")


def missing(connection, request):
    status = b"200 OK" if request.startswith("HEAD") else b"404 Not Found"
    connection.sendall(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        (half, ConnectionError, "after 500,002 of 1000000 bytes (the host broke off); nothing was kept, try again"),
        (silence, ConnectionError, "after 0 of unknown bytes (nothing came for 1 s)"),
        (half_and_silence, ConnectionError, "after 500,002 of 1000000 bytes (nothing came for 1 s)"),
        (drops, ConnectionError, "(more than 2 s)"),
        (a_page, ValueError, "not an IDX file of unsigned bytes: it starts with 3c 68 74 6d"),
        (missing, ConnectionError, "(HTTP Error 404: Not Found)"),
        (lambda connection, _: connection.sendall(b"\0garbage\r\n\r\n"), FileNotFoundError, "does not answer"),
    ],
)
def test_a_host_that_fails_is_an_error_within_the_time_out(nothing, monkeypatch, answer, error, message):
    monkeypatch.setattr(data, "STALL_SECONDS", 1.0)
    monkeypatch.setattr(data, "DOWNLOAD_SECONDS", 2.0)
    with host(answer) as url:
        monkeypatch.setattr(data, "URL", url)
        start = time.monotonic()
        with pytest.raises(error) as caught:
            data.load(source="download")
        assert time.monotonic() - start < 10
    assert message in str(caught.value)
    assert url in str(caught.value)
    assert not names(nothing / "home" / "tensorflow_datasets")


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, kind):
    path = tmp_path / kind
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(os.devnull)
    with pytest.raises(OSError, match="this is no regular file"):
        write_atomically(path, "new")
    assert path.exists()
    assert not path.is_file()


def test_links_that_lead_to_themselves_are_named(tmp_path):
    path = tmp_path / "loop"
    path.symlink_to(path)
    with pytest.raises(OSError, match=f"Too many levels of symbolic links.*{path}"):
        write_atomically(path, "new")


@pytest.mark.parametrize("name", ["run[1]", "lr=[0.1, 0.2]/deep", "back\\slash", os.fsdecode(b"caf\xe9")])
def test_checkpoint_directories_that_orbax_would_misread_are_refused(tmp_path, name):
    """It would write checkpoints there, and could not read them again."""
    with pytest.raises(ValueError, match=r"checkpoints cannot be kept in .* because orbax misreads"):
        Store(tmp_path / name, identity={})
    assert not any(tmp_path.iterdir())


def test_what_a_run_leaves_that_was_killed_in_its_first_moments_is_no_obstacle(tmp_path):
    (tmp_path / ".probe-0123abcd.partial").touch()
    with Store(tmp_path, identity={}) as store:
        assert store.restore({"weights": np.ones(3)}) is None
    assert names(tmp_path) == ["fashion_jax.lock"]


QUICK = ("--epochs", "2", "--seeds", "1", "--rates", "0.5", "--train-size", "500")


@pytest.mark.parametrize("redirection", ["2>&1 | true", "2>/dev/full", ">&-", "2>&-", ">&- 2>&-", "| head -c 1"])
def test_results_are_written_though_nobody_reads_the_output(tmp_path, redirection):
    command = f"{sys.executable} {EXAMPLE} {' '.join(QUICK)} --output {tmp_path} {redirection}"
    result = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, "Exception" in result.stderr) == (0, False), result.stderr
    assert {"report.md", "history.json", "losses.png"} <= set(names(tmp_path))


@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_a_full_disk_swallows_is_told_at_the_end(tmp_path, buffered):
    command = f"{sys.executable} {EXAMPLE} {' '.join(QUICK)} --output {tmp_path} >/dev/full"
    environment = os.environ | ({} if buffered else {"PYTHONUNBUFFERED": "1"})
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: not all could be written to standard output: [Errno 28] No space left on device")
    assert {"report.md", "history.json", "losses.png"} <= set(names(tmp_path))


def test_letters_that_the_terminal_lacks_end_no_run(tmp_path):
    command = [sys.executable, str(EXAMPLE), *QUICK, "--output", str(tmp_path)]
    command[command.index("--seeds") + 1] = "2"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    assert "\\xb1" in result.stdout
    assert "±" in (tmp_path / "report.md").read_text()


def test_progress_that_can_no_longer_be_shown_ends_no_run(caplog):
    batch = Batch(np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.int32))
    # It cannot even be closed.
    with contextlib.suppress(OSError), Path("/dev/full").open("w") as full:
        progress = Progress(3, file=full)
        run = fit(batch, batch, key=jax.random.key(0), config=TrainConfig(hidden=(8,)), epochs=3, on_epoch=progress)
        assert run.history.running_loss.shape == (3,)
    assert [record.message for record in caplog.records] == ["progress can no longer be shown"]
