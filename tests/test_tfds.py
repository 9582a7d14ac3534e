"""The data set as TFDS prepares it, without TensorFlow: made once, by four processes at the same time, then read.

One file, because the tests of a file run in one process: what takes longest here is to prepare it.
"""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from sources import finish, run_load, start_load

from fashion_jax import data

IMAGES, LABELS, TEST_IMAGES, _ = data.DIGESTS


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


class Prepared(NamedTuple):
    """The home of a user whose four processes have downloaded and prepared the data set, and how they ended."""

    home: Path
    ends: list
    requests: list[str]


@pytest.fixture(scope="module")
def prepared(server, tmp_path_factory) -> Prepared:
    home = tmp_path_factory.mktemp("prepared") / "größe 1 データ"
    home.mkdir()
    processes = [start_load(home, url=server.url, source="download") for _ in range(4)]
    ends = [finish(process) for process in processes]
    assert [end.returncode for end in ends] == [0] * 4, ends
    return Prepared(home, ends, list(server.requests))


def test_tfds_downloads_and_prepares_without_tensorflow(prepared, splits, nothing, monkeypatch):
    assert sorted(path.suffix for path in prepared.home.glob("tensorflow_datasets/fashion_mnist/3.0.1/*record*")) != []
    monkeypatch.setenv("HOME", str(prepared.home))
    assert {path.name for path in data.cache_dir().iterdir()} == data.DIGESTS.keys()
    # The published digests hold for what was cached, so the order is the published one too.
    jax.tree.map(np.testing.assert_array_equal, data.load(source="idx"), splits)


def test_stock_tfds_reads_what_was_prepared(prepared):
    code = f"""
import tensorflow_datasets as tfds
source = tfds.data_source("fashion_mnist", split="test", data_dir="{prepared.home}/tensorflow_datasets", download=False)
assert len(source) == 10_000 and source[0]["image"].shape == (28, 28, 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_who_asks_for_the_download_gets_past_damaged_files_and_a_full_disk(prepared, copy, tmp_path):
    """Both in one process, because TFDS reads for long; the disk costs only the cache."""
    (copy / TEST_IMAGES).unlink()
    place = prepared.home / "tensorflow_datasets"
    result = run_load(tmp_path, source="download", data_dir=place, debian=copy, largest_file=40_000_000)
    assert result.returncode == 0, result.stderr
    assert f"Fashion-MNIST from the TFDS data set in {place}" in result.stderr
    assert result.stdout.splitlines()[-1] == "(60000, 28, 28) int32"
    assert "the arrays were not cached, so the next load takes as long: [Errno 27] File too large" in result.stderr
    assert not names(tmp_path / ".cache" / "fashion_jax")


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_record_file_is_found(prepared, tmp_path, damage):
    place = tmp_path / "tfds"
    shutil.copytree(prepared.home / "tensorflow_datasets" / "fashion_mnist", place / "fashion_mnist")
    record = next(place.glob("fashion_mnist/*/*train.array_record*"))
    content = bytearray(record.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    else:
        del content[len(content) // 2 :]
    record.write_bytes(content)
    result = run_load(tmp_path, source="tfds", data_dir=place)
    assert result.returncode != 0
    assert "ValueError" in result.stderr.splitlines()[-1] or "ValueError" in result.stderr
    assert f"{place}/fashion_mnist" in result.stderr
    assert not (tmp_path / ".cache").exists()


def test_four_processes_at_once_from_nothing_make_one_copy(prepared):
    downloads = [end for end in prepared.ends if "downloading Fashion-MNIST" in end.stderr]
    assert len(downloads) == 1
    assert sorted(line.split()[1] for line in prepared.requests if line.startswith("GET")) == sorted(
        f"/{name}.gz" for name in data.DIGESTS
    )
    others = [end for end in prepared.ends if end not in downloads]
    assert ["another process has prepared it meanwhile" in end.stderr for end in others] == [True] * 3
    assert [end.stdout.splitlines()[-1] for end in prepared.ends] == ["(60000, 28, 28) int32"] * 4
    assert names(prepared.home / "tensorflow_datasets") == ["fashion_mnist"]
    assert names(prepared.home / "tensorflow_datasets" / "fashion_mnist") == ["3.0.1"]
    assert names(prepared.home / ".cache" / "fashion_jax") == sorted(data.DIGESTS)


def test_a_prepared_directory_is_read_and_cached(prepared, idx_dir, tmp_path):
    """The cache is damaged and half written, and a writer that was killed has left something as well."""
    place = prepared.home / "tensorflow_datasets"
    cache = tmp_path / ".cache" / "fashion_jax"
    cache.mkdir(parents=True)
    (cache / IMAGES).write_bytes((idx_dir / IMAGES).read_bytes()[:1000])
    (cache / LABELS).write_bytes((idx_dir / LABELS).read_bytes())
    (cache / f".{TEST_IMAGES}-0123abcd.partial").touch()
    result = run_load(tmp_path, data_dir=place)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "(60000, 28, 28) int32\n"
    assert f"Fashion-MNIST from the TFDS data set in {place}" in result.stderr
    assert names(cache) == sorted(data.DIGESTS)
    for name in data.DIGESTS:
        assert (cache / name).read_bytes() == (idx_dir / name).read_bytes()
    for source in ("auto", "download"):
        again = run_load(tmp_path, data_dir=place, source=source)
        assert f"from the IDX files in {tmp_path}/.cache/fashion_jax" in again.stderr


def test_a_full_disk_while_preparing_leaves_nothing(server, tmp_path):
    result = run_load(tmp_path, url=server.url, source="download", largest_file=4_000_000)
    assert result.returncode == 1
    assert "TFDS cannot prepare the data set: " in result.stderr
    assert "File too large" in result.stderr
    assert names(tmp_path) == ["tensorflow_datasets"]
    assert not names(tmp_path / "tensorflow_datasets")


def test_what_tfds_has_not_finished_is_no_data_set(prepared, nothing, monkeypatch):
    place = nothing / "home" / "tensorflow_datasets" / "fashion_mnist"
    place.mkdir(parents=True)
    version = prepared.home / "tensorflow_datasets" / "fashion_mnist" / "3.0.1"
    (place / "incomplete.ABC123_3.0.1").symlink_to(version)
    with pytest.raises(FileNotFoundError, match="Any of these helps"):
        data.load(source="tfds")
