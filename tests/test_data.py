"""The data set from every source, and from sources that are damaged or not there. Files and servers are real."""

import gzip
import logging
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from sources import idx_bytes, replace

from fashion_jax import Batch, data

KEY = jax.random.key(0)
IMAGES, LABELS, TEST_IMAGES, TEST_LABELS = data.DIGESTS


def assert_same(first, second):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def test_what_is_loaded(splits):
    assert splits.train.images.shape == (60_000, 28, 28)
    assert splits.test.images.shape == (10_000, 28, 28)
    assert splits.train.images.dtype == np.uint8
    assert splits.train.labels.dtype == np.int32
    assert np.bincount(splits.train.labels).tolist() == [6_000] * 10
    assert np.bincount(splits.test.labels).tolist() == [1_000] * 10
    assert len(data.CLASS_NAMES) == 10
    # The first training image is a boot, the second a T-shirt: order and names agree.
    assert [data.CLASS_NAMES[label] for label in splits.train.labels[:2]] == ["Ankle boot", "T-shirt/top"]
    assert not any(leaf.flags.writeable for leaf in jax.tree.leaves(splits))


@pytest.mark.parametrize("source", ["auto", "idx"])
def test_files_in_a_directory(idx_dir, gzip_dir, splits, nothing, source):
    assert_same(data.load(idx_dir, source=source), splits)
    assert_same(data.load(str(gzip_dir), source=source), splits)


def test_the_variable_names_the_directory(idx_dir, splits, nothing, monkeypatch, caplog):
    monkeypatch.setenv(data.DATA_VARIABLE, str(idx_dir))
    with caplog.at_level(logging.INFO, "fashion_jax"):
        assert_same(data.load(), splits)
    assert [record.message for record in caplog.records] == [f"Fashion-MNIST from the IDX files in {idx_dir}"]


def test_torchvision_s_directory(idx_dir, splits, nothing):
    (nothing / "FashionMNIST").mkdir()
    (nothing / "FashionMNIST" / "raw").symlink_to(idx_dir)
    assert_same(data.load(nothing), splits)


def test_the_user_s_cache_and_debian_s_directory(idx_dir, gzip_dir, splits, nothing, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_DIR", gzip_dir)
    assert_same(data.load(), splits)
    data.cache_dir().parent.mkdir(parents=True)
    data.cache_dir().symlink_to(idx_dir)
    monkeypatch.setattr(data, "DEBIAN_DIR", nothing / "no")
    assert_same(data.load(), splits)


def test_the_user_s_directories_are_where_the_variables_say(nothing, idx_dir, splits, monkeypatch):
    home = nothing / "home"
    assert data.cache_dir() == home / ".cache" / "fashion_jax"
    assert data._tfds_dirs(None) == [home / "tensorflow_datasets"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(nothing / "cache"))
    monkeypatch.setenv("TFDS_DATA_DIR", "~/tfds")
    assert data.cache_dir() == nothing / "cache" / "fashion_jax"
    assert data._tfds_dirs(None) == [home / "tfds"]
    assert data._tfds_dirs(nothing) == [nothing, home / "tfds"]
    home.mkdir()
    (home / "files").symlink_to(idx_dir)
    assert_same(data.load("~/files"), splits)


def test_an_empty_directory_falls_back(idx_dir, splits, nothing, monkeypatch):
    monkeypatch.setattr(data, "DEBIAN_DIR", idx_dir)
    assert_same(data.load(nothing), splits)


@pytest.mark.parametrize("name", data.DIGESTS)
def test_one_flipped_bit_is_found(copy, nothing, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    replace(copy / name, bytes(content))
    with pytest.raises(ValueError, match=f"{copy / name}: expected the published {name} with SHA-256"):
        data.load(copy)


def test_swapped_files_are_named(copy, nothing):
    (copy / IMAGES).rename(copy / "other")
    (copy / TEST_IMAGES).rename(copy / IMAGES)
    (copy / "other").rename(copy / TEST_IMAGES)
    with pytest.raises(ValueError, match=f"{IMAGES}: expected .* found the content of {TEST_IMAGES}"):
        data.load(copy)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda content: content[:-1], r"tells \[60000\], 60000 bytes, but 59999 follow"),
        (lambda content: content + b"\0", "but 60001 follow"),
        (lambda content: b"\0\0\x08\x01\0\0\xea\x61" + content[8:], r"tells \[60001\]"),
        (lambda content: b"PNG!" + content[4:], "not an IDX file of unsigned bytes: it starts with 50 4e 47 21"),
        (lambda content: content[:6], "header is cut short after 6 bytes"),
        (lambda content: b"", "starts with nothing"),
        (lambda content: gzip.compress(content)[:-100], "damaged gzip file"),
        (lambda content: gzip.compress(content) + b"garbage", "damaged gzip file"),
        (lambda content: gzip.compress(content[:-1] + b"\x0a"), "expected the published"),
    ],
)
def test_damaged_files_are_named(copy, nothing, spoil, message):
    replace(copy / LABELS, spoil((copy / LABELS).read_bytes()))
    with pytest.raises(ValueError, match=message) as caught:
        data.load(copy)
    assert str(copy / LABELS) in str(caught.value)


def test_a_missing_file_is_named(copy, nothing):
    (copy / TEST_LABELS).unlink()
    with pytest.raises(FileNotFoundError, match=f"{copy} lacks {TEST_LABELS}"):
        data.load(copy)


def test_a_wrong_directory_is_named(nothing, monkeypatch):
    with pytest.raises(FileNotFoundError, match="data_dir does not exist: /no/such"):
        data.load("/no/such")
    with pytest.raises(FileNotFoundError, match="data_dir is not a directory"):
        data.load(__file__)
    monkeypatch.setenv(data.DATA_VARIABLE, "/no/such")
    with pytest.raises(FileNotFoundError, match=rf"\${data.DATA_VARIABLE} does not exist"):
        data.load()


def test_an_unknown_source_is_refused():
    with pytest.raises(ValueError, match="source must be one of auto, idx, tfds, download; got 'torch'"):
        data.load(source="torch")


def test_a_damaged_file_in_the_cache_is_removed_and_no_other(copy, idx_dir, splits, nothing, monkeypatch, caplog):
    monkeypatch.setattr(data, "DEBIAN_DIR", idx_dir)
    data.cache_dir().parent.mkdir(parents=True)
    copy.rename(data.cache_dir())
    replace(data.cache_dir() / IMAGES, (idx_dir / IMAGES).read_bytes()[:1000])
    assert_same(data.load(), splits)
    assert "damaged" in caplog.text
    assert {path.name.removesuffix(".gz") for path in data.cache_dir().iterdir()} == data.DIGESTS.keys() - {
        IMAGES.removesuffix(".gz")
    }


def test_a_file_in_the_cache_that_holds_something_else_is_removed(copy, idx_dir, splits, nothing, monkeypatch, caplog):
    """It can be read, and one pixel is another."""
    monkeypatch.setattr(data, "DEBIAN_DIR", idx_dir)
    data.cache_dir().parent.mkdir(parents=True)
    copy.rename(data.cache_dir())
    images = splits.test.images.copy()
    images[5, 3, 3] ^= 1
    for path in data.cache_dir().glob("t10k-images*"):
        path.unlink()
    (data.cache_dir() / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(images))
    assert_same(data.load(), splits)
    assert "expected the published t10k-images-idx3-ubyte" in caplog.text
    assert len(list(data.cache_dir().iterdir())) == 3


def test_the_other_spelling_of_a_damaged_file_in_the_cache_is_read(copy, splits, nothing):
    data.cache_dir().parent.mkdir(parents=True)
    copy.rename(data.cache_dir())
    plain = data.cache_dir() / "t10k-labels-idx1-ubyte"
    packed = plain.with_name(plain.name + ".gz")
    content = idx_bytes(splits.test.labels.astype(np.uint8))
    for path in (plain, packed):
        path.unlink(missing_ok=True)
    packed.write_bytes(gzip.compress(content))
    plain.write_bytes(content[:1000])
    assert_same(data.load(source="idx"), splits)
    assert not plain.exists()
    assert len(list(data.cache_dir().iterdir())) == 4


def test_labels_may_be_huge(small):
    """A count for each number up to the largest would need terabytes."""
    huge = Batch(small.images[:10], np.array([3, 2**40] * 5))
    part, rest = data.hold_out(huge, 0.4, key=jax.random.key(0))
    assert sorted(rest.labels.tolist()) == [3, 3, 2**40, 2**40]
    assert len(part.labels) == 6


def test_tensors_of_pytorch_are_named(small):
    torch = pytest.importorskip("torch")
    for part in ("images", "labels"):
        batch = small._replace(**{part: torch.tensor(getattr(small, part))})
        with pytest.raises(
            TypeError, match=rf"train\.{part} must be an array .* got torch\.Tensor .* have \.numpy\(\)"
        ):
            data.check_batch(batch, "train")


def test_no_data_and_no_network(nothing):
    start = time.monotonic()
    with pytest.raises(FileNotFoundError) as caught:
        data.load()
    assert time.monotonic() - start < 5
    for way in ("data_dir", data.DATA_VARIABLE, str(data.cache_dir()), "apt-get install", "TFDS", "download"):
        assert way in str(caught.value)
    for source in ("idx", "tfds", "download"):
        with pytest.raises(FileNotFoundError, match="Any of these helps"):
            data.load(source=source)


def test_a_host_that_never_answers(nothing, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(data, "URL", f"http://127.0.0.1:{silent.getsockname()[1]}/")
        start = time.monotonic()
        with pytest.raises(FileNotFoundError, match="does not answer"):
            data.load()
        assert time.monotonic() - start < 5


def test_the_command_reports_what_is_there(idx_dir, nothing, capsys):
    assert data.main(["--data-dir", str(idx_dir)]) == 0
    report = capsys.readouterr().out
    assert "train: 60,000 images" in report
    assert "test: 10,000 images" in report
    for name, digest in data.DIGESTS.items():
        assert f"{digest}  {name}" in report
    assert "6,000  Ankle boot" in report


def test_the_command_fails_with_one_message(nothing, capsys):
    assert data.main([]) == 1
    assert capsys.readouterr().err.startswith("error: no Fashion-MNIST here")


def test_the_command_runs_as_a_module(idx_dir):
    command = [sys.executable, "-W", "error", "-m", "fashion_jax.data", "--data-dir", str(idx_dir)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Fashion-MNIST from the IDX files" in result.stderr


def test_hold_out_is_stratified_and_complete(splits):
    rest, held_out = data.hold_out(splits.train, 0.2, key=KEY)
    assert np.bincount(held_out.labels).tolist() == [1_200] * 10
    assert np.bincount(rest.labels).tolist() == [4_800] * 10
    # Both parts together are the whole: the sums over all pixels of all images tell.
    sums = sorted([*rest.images.sum((1, 2)), *held_out.images.sum((1, 2))])
    assert sums == sorted(splits.train.images.sum((1, 2)))
    again = data.hold_out(splits.train, 0.2, key=KEY)
    assert_same(again, (rest, held_out))
    _, other = data.hold_out(splits.train, 0.2, key=jax.random.key(1))
    assert not (other.images == held_out.images).all()


def numbered(labels) -> Batch:
    """Examples that carry their own number, to see where they went."""
    images = np.zeros((len(labels), 2, 1), np.uint8)
    images[:, 0, 0], images[:, 1, 0] = np.divmod(np.arange(len(labels)), 256)
    return Batch(images, np.asarray(labels, np.int32))


def numbers(batch: Batch) -> list[int]:
    return (np.asarray(batch.images)[:, :, 0].astype(int) @ [256, 1]).tolist()


@pytest.mark.parametrize("labels", [np.arange(1000) % 10, np.repeat([0, 3, 9], [10, 190, 800]), np.zeros(1000, int)])
def test_parts_are_nested_stratified_and_keep_the_order(labels):
    batch = numbered(labels)
    last: set[int] = set()
    for size in (1, 10, 100, 550, 1000):
        part = data.subset(batch, size, key=KEY)
        members = numbers(part)
        assert members == sorted(set(members))
        assert len(members) == size
        assert last <= set(members)
        np.testing.assert_array_equal(part.labels, labels[members])
        share = np.bincount(labels, minlength=10) / len(labels)
        assert abs(np.bincount(part.labels, minlength=10) - size * share).max() <= 1
        last = set(members)
    rest, held_out = data.hold_out(batch, 0.3, key=KEY)
    assert sorted([*numbers(rest), *numbers(held_out)]) == list(range(1000))
    assert len(held_out.labels) == 300


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 1.5, float("nan"), 1e-9])
def test_hold_out_refuses_a_fraction_out_of_range(small, fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\)"):
        data.hold_out(small, fraction, key=KEY)


@pytest.mark.parametrize("size", [0, -1, 1001])
def test_subset_refuses_a_size_out_of_range(small, size):
    with pytest.raises(ValueError, match="size must lie between 1 and the 1000 examples"):
        data.subset(small, size, key=KEY)


def test_parts_refuse_wrong_types(small, unchecked):
    with pytest.raises(TypeError, match="size must be an int"):
        data.subset(small, 10.0, key=KEY)
    with pytest.raises(TypeError, match="fraction must be a number"):
        data.hold_out(small, "0.2", key=KEY)
    with pytest.raises(TypeError, match="must be uint8"):
        data.subset(Batch(small.images / 255, small.labels), 10, key=KEY)
