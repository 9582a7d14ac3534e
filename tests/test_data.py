"""The data set from every source, damaged and missing ones too, and its parts. Files, hosts and processes are real."""

import contextlib
import gzip
import hashlib
import logging
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import jax
import numpy as np
import pytest
from sweep_worker import same

from benchmarks.fuzz import idx_bytes
from fashion_jax import data, sources
from fashion_jax.catalog import DATA_SETS, FILES
from fashion_jax.types import Batch, Splits

KEY = jax.random.key(0)
CACHE = ".cache/fashion_jax"
TFDS = "tensorflow_datasets"


def published(splits) -> dict[str, bytes]:
    return dict(zip(FILES, map(idx_bytes, (*splits.train, *splits.test)), strict=True))


def zipped(splits) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content, 1, mtime=0) for name, content in published(splits).items()}


def write(place: Path, files) -> Path:
    for name, content in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_bytes(content)
    return place


def sums(files: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}


def digests(place: Path) -> dict[str, str]:
    return sums({str(path.relative_to(place)): path.read_bytes() for path in place.rglob("*") if path.is_file()})


def register(monkeypatch, name: str, **changes) -> None:
    """Change what is known of a published data set."""
    monkeypatch.setitem(DATA_SETS, name, DATA_SETS[name]._replace(**changes))


@pytest.fixture
def tiny(splits, monkeypatch, tmp_path) -> Splits:
    """Fifty images that count as the published ones, and a user without data and network, at home in `tmp_path`."""
    for variable in ("XDG_CACHE_HOME", "TFDS_DATA_DIR", "FASHION_JAX_DATA", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sources, "DEBIAN_DIR", tmp_path / "debian")
    parts = Splits(*(Batch(batch.images[:n], batch.labels[:n]) for batch, n in zip(splits, (30, 20), strict=True)))
    for name in DATA_SETS:
        register(monkeypatch, name, url="http://127.0.0.1:9/")
    register(monkeypatch, "fashion_mnist", digests=sums(published(parts)))
    return parts


@contextlib.contextmanager
def host(monkeypatch, answer):
    """Serve `answer(path, n)`, the whole response to the n-th request for a file, or None to fall silent."""
    requests, end = [], threading.Event()

    class Handler(BaseHTTPRequestHandler):  # It answers HEAD with 501, as some proxies do.
        def do_GET(self):
            requests.append(Path(self.path))
            response = answer(requests[-1], requests.count(requests[-1]))
            self.wfile.write(response) if response is not None else end.wait()

        def log_message(self, format, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        for name in DATA_SETS:
            register(monkeypatch, name, url=f"http://127.0.0.1:{server.server_port}/{name}/")
        for seconds in ("PROBE_SECONDS", "STALL_SECONDS"):
            monkeypatch.setattr(sources, seconds, 60)
        try:
            yield requests
        finally:
            end.set()
            server.shutdown()


def whole(content: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content) + content


@pytest.mark.parametrize("layout", ["{}", "{}.gz", "FashionMNIST/raw/{}", "raw/{}.gz", "{0}/{0}", "{0}.gz/{0}"])
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_layouts_of_a_directory(tiny, tmp_path, layout, near, compress):
    files = {layout.format(n.replace("-idx", ".idx") if near else n): compress(c) for n, c in published(tiny).items()}
    place = write(tmp_path / "größe 1 データ", files)
    before = digests(place)
    same(found := data.load(data_dir=place), tiny)
    assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(found))
    assert digests(place) == before


def test_places_and_their_order(tiny, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "fashion_jax")
    for place in (sources.DEBIAN_DIR, tmp_path / CACHE, tmp_path / "xdg" / "fashion_jax", tmp_path / "files"):
        write(place, published(tiny))
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg") if place.parent.name == "xdg" else "")
        monkeypatch.setenv("FASHION_JAX_DATA", "~/files" if place.name == "files" else "")
        same(data.load(), tiny)
        assert caplog.messages[-1] == f"Fashion-MNIST from {place}"


def flip(content: bytes, at: int = -5) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    ("change", "message"),  # The change makes new content of the old, a link, or nothing.
    [
        (flip, "{path} does not hold Fashion-MNIST's {name}, but SHA-256 .*; fetch it again"),
        (lambda content: content[:-1], "{path} is damaged, .* cannot reshape"),
        (lambda content: b"PNG!" + content[4:], "{path} .* no IDX file .* it starts with 50 4e 47 21"),
        (lambda content: b"\0\0\x08\xff" + bytes(4) + b"\xff" * 4 * 254, "{path} .* supported dimension"),
        (lambda content: b"", "{path} .* it starts with nothing"),
        (lambda content: gzip.compress(content)[:-9], "{path} .* ended before the end-of-stream"),
        (lambda content: gzip.compress(content)[:-7] + b"1234567", "{path} .* CRC check failed"),
        (lambda content: "/proc/self/mem", "Input/output error"),
        (lambda content: None, "{path.parent} lacks {name}; it holds t"),
    ],
)
def test_damaged_files(tiny, tmp_path, caplog, change, message, name):
    """In the user's directory they are an error, even in the one that is the cache; elsewhere they are passed over."""
    write(sources.DEBIAN_DIR, files := published(tiny))
    path = write(tmp_path / CACHE, files) / name
    path.unlink()
    damaged = change(files[name])
    if damaged is not None:
        path.symlink_to(damaged) if isinstance(damaged, str) else path.write_bytes(damaged)
    before = {file: file.lstat().st_mtime_ns for file in path.parent.iterdir()}
    with pytest.raises((ValueError, OSError), match=message.format(path=path, name=name)):
        data.load(data_dir=path.parent)
    same(data.load(), tiny)
    assert caplog.messages[-1].startswith("passing over ")
    assert {file: file.lstat().st_mtime_ns for file in path.parent.iterdir()} == before
    # A sound copy beside it is enough.
    write(path.parent, {f"{name}.gz": gzip.compress(files[name])})
    same(data.load(data_dir=path.parent), tiny)


def test_the_error_says_where_it_looked(tiny, tmp_path):
    place = write(tmp_path / "photos", {f"{i}.png": b"" for i in range(10)})
    with pytest.raises(FileNotFoundError) as caught:
        data.load(data_dir=place)
    message = str(caught.value)
    assert f"no Fashion-MNIST in {place} (which holds 0.png, 1.png, 2.png" in message
    for part in (tmp_path / CACHE, tmp_path / TFDS, sources.DEBIAN_DIR, "Connection refused", "`make data`", *FILES):
        assert str(part) in message
    assert "\n" not in message
    for source in ("idx", "tfds", "download"):
        with pytest.raises(FileNotFoundError, match="no Fashion-MNIST in"):
            data.load(source=source)
    with pytest.raises(FileNotFoundError, match=r"no MNIST in .* name it by data_dir or \$FASHION_JAX_DATA$"):
        data.load("mnist")


@pytest.mark.parametrize(
    ("answer", "limits", "message"),
    [
        (lambda file, n: None, {"PROBE_SECONDS": 0.3}, r"\(no answer within 0.3 s\)"),
        (lambda file, n: whole(file) if len(file) < 99 else None, {"STALL_SECONDS": 0.3}, r"\(timed out\)"),
        (lambda file, n: whole(file)[:-9], {}, "IncompleteRead"),
        (lambda file, n: b"HTTP/1.1 404 Not Found\r\n\r\n", {}, r"\(Not Found\)"),
        (lambda file, n: whole(b"<html>"), {}, "the answer is damaged, or no IDX file"),
    ],
)
def test_faults_of_the_host(tiny, tmp_path, monkeypatch, answer, limits, message):
    with host(monkeypatch, lambda file, n: answer(published(tiny)[file.stem], n)):
        for name, seconds in limits.items():
            monkeypatch.setattr(sources, name, seconds)
        with pytest.raises(FileNotFoundError, match=message):
            data.load()
    assert not list((tmp_path / CACHE).glob("*-ubyte*"))


# TFDS warns of its own and its dependencies' futures.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("obstacle", "message", "prepared"),
    [
        (lambda p: [p.delenv("HOME"), p.setattr("pwd.getpwuid", {}.__getitem__)], "no home directory", None),
        (lambda p: p.setenv("TFDS_DATA_DIR", "gs://bucket"), "", CACHE),
        (".cache", "Not a directory", TFDS),
        (TFDS, "no TFDS data set was prepared in", None),
        (f"{TFDS}/fashion_mnist/3.0.1/train.tfrecord", "", CACHE),
        (f"{TFDS}/fashion_mnist/4.0.0/train.array_record", "", TFDS),
    ],
)
def test_obstacles_cost_no_more_than_a_copy(tiny, tmp_path, monkeypatch, caplog, obstacle, message, prepared):
    """A file or the environment is in the way, and the host breaks off twice."""
    with host(monkeypatch, lambda file, n: whole(zipped(tiny)[file.name])[: None if n == 3 else -9]):
        write(tmp_path, {obstacle: b""}) if isinstance(obstacle, str) else obstacle(monkeypatch)
        before = digests(tmp_path)
        same(data.load(), tiny)
    assert message in caplog.text
    assert digests(tmp_path).items() >= before.items()
    assert prepared is None or list((tmp_path / prepared).glob("fashion_mnist/3.0.1/*.array_record*"))


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_tfds_data_set(tiny, tmp_path, monkeypatch, caplog):
    place = tmp_path / "tfds"
    monkeypatch.setenv("TFDS_DATA_DIR", str(place))
    sources._prepare_tfds(DATA_SETS["fashion_mnist"], tiny, [place])
    (record,) = place.glob("*/*/*train.array_record*")
    for damaged in (flip(record.read_bytes(), 5_000), record.read_bytes()[:-9], b""):
        record.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{place}/fashion_mnist/3.0.1, split 'train', "):
            data.load(data_dir=place)
        with pytest.raises(FileNotFoundError, match="no Fashion-MNIST in"):
            data.load()
        assert caplog.messages[-1].startswith(f"passing over {place}")
    assert not list((tmp_path / CACHE).glob("*-ubyte"))


LOAD = """
import sys
from fashion_jax import data, sources
sources.DEBIAN_DIR, sources.PROBE_SECONDS = sources.Path("/no/such"), 60
fashion = data.DATA_SETS["fashion_mnist"]._replace(url=sys.argv[1], digests=dict(zip(data.FILES, sys.argv[2:])))
data.DATA_SETS["fashion_mnist"] = fashion
print(data.load())
"""


@pytest.mark.filterwarnings("ignore")
def test_two_processes_at_once_download_and_prepare_one_copy(tiny, tmp_path, monkeypatch):
    with host(monkeypatch, lambda file, _: whole(published(tiny)[file.stem])) as requests:
        url, known = DATA_SETS["fashion_mnist"].url, DATA_SETS["fashion_mnist"].digests
        command = [sys.executable, "-c", LOAD, url, *known.values()]
        processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert all(process.communicate()[0].endswith(f"{tiny!r}\n") for process in processes)
    assert sorted(file.stem for file in requests) == sorted(FILES)
    assert digests(tmp_path / CACHE).items() >= known.items()
    tfds = pytest.importorskip("tensorflow_datasets")
    assert len(tfds.data_source("fashion_mnist", split="test", data_dir=tmp_path / TFDS, download=False)) == 20
    same(data.load(source="tfds"), tiny)


@pytest.fixture
def relatives(tiny, splits, monkeypatch) -> dict[str, Splits]:
    """Forty other images that count as MNIST, and twenty as KMNIST, of which one digest is of a gzipped file."""
    found = {"fashion_mnist": tiny}
    for name, rows in {"mnist": slice(100, 140), "kmnist": slice(200, 220)}.items():
        found[name] = Splits(*(Batch(*(leaf[rows] for leaf in batch)) for batch in splits))
        files, gzipped = published(found[name]), zipped(found[name])
        if name == "kmnist":
            files = {f"{FILES[0]}.gz": gzipped[f"{FILES[0]}.gz"]} | {file: files[file] for file in FILES[1:]}
        register(monkeypatch, name, digests=sums(files))
    return found


@pytest.mark.filterwarnings("ignore")
def test_each_data_set_has_a_directory_of_its_own(relatives, tmp_path, monkeypatch, capsys, caplog):
    """In the cache, in a directory that holds them all as the cache does, and where torchvision puts it."""
    caplog.set_level(logging.INFO, "fashion_jax")  # `main` would leave it so.
    with host(monkeypatch, lambda file, _: whole(zipped(relatives[file.parent.name])[file.name])):
        for name, parts in relatives.items():
            same(data.load(name), parts)
            write(tmp_path / DATA_SETS[name].title.replace("-", "") / "raw", zipped(parts))
    for options in ({"source": "idx"}, {"source": "tfds"}, {"data_dir": tmp_path / CACHE}, {"data_dir": tmp_path}):
        for name, parts in relatives.items():
            same(data.load(name, **options), parts)
    assert data.main(["--name", "mnist", "--data-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("\nMNIST: 40 training images and 40 test images\n")
    with pytest.raises(ValueError, match=f"{tmp_path}/MNIST/raw/t10k-images-.* does not hold Fashion-MNIST's t10k-im"):
        data.load(data_dir=tmp_path / "MNIST")


def test_a_file_of_which_only_the_gzipped_digest_is_known(relatives, tmp_path, monkeypatch):
    parts, name = relatives["kmnist"], f"{FILES[0]}.gz"
    other = zipped(parts) | {name: gzip.compress(published(parts)[FILES[0]], mtime=1)}
    place = write(tmp_path / "other", other)
    with pytest.raises(ValueError, match=f"{place / name} does not hold KMNIST's train-images-idx3-ubyte"):
        data.load("kmnist", data_dir=place)
    with (
        host(monkeypatch, lambda file, _: whole(gzip.decompress(other[file.name]))),
        pytest.raises(FileNotFoundError, match="the answer does not hold KMNIST's train-images-idx3-ubyte"),
    ):
        data.load("kmnist")
    (place / name).unlink()
    same(data.load("kmnist", data_dir=write(place, published(parts))), parts)
    write(place, {FILES[0]: idx_bytes(np.zeros((19, 28, 28), np.uint8))})
    with pytest.raises(ValueError, match=r"holds training images \[19, 28, 28\] for 20 labels; fetch train-images"):
        data.load("kmnist", data_dir=place)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", DATA_SETS)
def test_tfds_knows_the_same_data_sets(name, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    ours, theirs = DATA_SETS[name], tfds.builder(name, data_dir=tmp_path)
    downloads = {url.removeprefix(ours.url): info for url, info in theirs.url_infos.items()}
    assert downloads.keys() == {f"{file}.gz" for file in FILES}
    assert round(sum(info.size for info in downloads.values()) / 1e6) == ours.megabytes
    assert theirs.info.features["label"].names == list(ours.class_names)
    assert str(theirs.version) == sources.TFDS_VERSION
    assert {file.removesuffix(".gz") for file in ours.digests} == set(FILES)
    assert all(downloads[file].checksum == ours.digests[file] for file in downloads.keys() & ours.digests.keys())


def test_the_script_falls_back_to_debian_s_package(tiny, splits, tmp_path):
    """Stand-ins for apt-get and dpkg-deb hand it over."""
    stand_ins = {"apt-get": b"#!/bin/sh\ntouch dataset-1.deb", "dpkg-deb": b'#!/bin/sh\ncp -r "$PACKAGE"/* .'}
    for file in write(tmp_path / "bin", stand_ins).iterdir():
        file.chmod(0o755)
    files = {f"usr/share/datasets/fashion-mnist/{name}": content for name, content in zipped(splits).items()}
    environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PACKAGE": str(write(tmp_path / "package", files))}
    environment = os.environ | environment | {"http_proxy": "http://127.0.0.1:9", "PYTHONWARNINGS": "error"}
    command = ["sh", Path(__file__).parents[1] / "scripts" / "get_data.sh", sys.executable]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    fallback, source = done.stderr.splitlines()
    assert fallback.startswith(f"no Fashion-MNIST in {tmp_path / CACHE}, ")
    assert fallback.endswith("Connection refused); taking Debian's package dataset-fashion-mnist instead")
    assert source == f"Fashion-MNIST from {tmp_path / CACHE}"
    assert done.stdout == "Fashion-MNIST: 60,000 training images and 10,000 test images\n"


@pytest.mark.parametrize("labels", [np.arange(1000) % 10, np.repeat([0, 3, 9], [10, 190, 800]), np.zeros(1000, int)])
def test_parts_are_nested_stratified_and_keep_the_order(labels):
    def members(part: Batch) -> list[int]:
        return part.images.view(">u2").ravel().tolist()

    batch, last = Batch(np.arange(1000, dtype=">u2").view(np.uint8).reshape(1000, 1, 2), labels), set()
    for size in (1, 10, 100, 550, 1000):
        part = data.subset(batch, size, key=KEY)
        assert members(part) == sorted(last | set(members(part)))
        np.testing.assert_array_equal(part.labels, labels[members(part)])
        assert abs(np.bincount(part.labels, minlength=10) - size / 1000 * np.bincount(labels, minlength=10)).max() <= 1
        last = set(members(part))
        assert len(last) == size
    rest, held_out = map(members, data.hold_out(batch, 0.3, key=KEY))
    assert rest == sorted(last - set(held_out))
    assert (held_out, len(held_out)) == (sorted(held_out), 300)
    assert held_out != members(data.hold_out(batch, 0.3, key=jax.random.key(1))[1])
