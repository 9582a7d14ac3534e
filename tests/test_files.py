"""Files are whole or absent, and a damaged one is noticed. Processes, limits and file systems are real."""

import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from fashion_jax.files import DamagedError, load_tensors, save_tensors, write

DTYPES = ["bool", "float16", "float32", "float64", ml_dtypes.bfloat16]
DTYPES += [f"{kind}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)]
TENSORS = {"kernel": np.arange(6.0).reshape(2, 3).T, "step": np.array(7, np.int32), "none": np.zeros((0, 3))}
METADATA = {"rate": "0.2", "seed": "3", "umlaut": "ä", "format": "pt"}


@pytest.fixture
def saved(tmp_path) -> Path:
    save_tensors(tmp_path / "directory" / "file", TENSORS, METADATA)
    return tmp_path / "directory" / "file"


@pytest.mark.parametrize("content", ["text with an ä", b"bytes", ""])
def test_a_file_is_made_or_replaced_with_its_directories(tmp_path, content):
    path = tmp_path / "a" / "b" / "file"
    for text in ("before", content):
        write(str(path), text)
    assert path.read_bytes() == (content if isinstance(content, bytes) else content.encode())
    assert [file.name for file in path.parent.iterdir()] == ["file"]


def test_a_link_keeps_leading_to_its_file(tmp_path):
    """Which is written where it lies: a rename does not reach another file system."""
    target = tmp_path / "elsewhere" / "file"
    (tmp_path / "link").symlink_to(target)
    for content in ("first", "second"):
        write(tmp_path / "link", content)
        assert target.read_text() == content
    assert sorted(file.name for file in tmp_path.iterdir()) == ["elsewhere", "link"]


FULL_DISK = """
import resource, signal, sys
import fashion_jax.files as files
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
files.write(sys.argv[1], "x" * 100_000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_full_disk_leaves_the_file_before(saved):
    before = saved.read_bytes()
    result = subprocess.run([sys.executable, "-c", FULL_DISK, saved], capture_output=True, text=True, check=False)
    assert f"not written, an existing file is intact: '{saved}'" in result.stderr.splitlines()[-1]
    assert [(file.name, file.read_bytes()) for file in saved.parent.iterdir()] == [("file", before)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 4)])
def test_tensors_come_back_bit_for_bit(tmp_path, dtype, shape):
    bits = np.random.default_rng(0).bytes(np.dtype(dtype).itemsize * int(np.prod(shape)))
    array = np.ones(shape, bool) if dtype == "bool" else np.frombuffer(bits, dtype).reshape(shape)
    arrays = {"a": array, "transposed": array.T, "backwards": array[..., ::-1] if shape else array}
    save_tensors(tmp_path / "file", arrays, METADATA)
    tensors, metadata = load_tensors(tmp_path / "file")
    assert metadata == METADATA
    for name, array in arrays.items():
        assert (tensors[name].dtype, tensors[name].shape) == (array.dtype, array.shape)
        assert tensors[name].tobytes() == array.tobytes()
    # The same content in another order is the same file.
    save_tensors(tmp_path / "again", dict(reversed(arrays.items())), dict(reversed(METADATA.items())))
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_every_flipped_bit_raises(saved):
    before = saved.read_bytes()
    flips = ((i, byte ^ 1 << bit) for i, byte in enumerate(before) for bit in range(8))
    others = [before[:i] + bytes([byte]) + before[i + 1 :] for i, byte in flips]
    for content in [*others, before[:-1], before + b"\0", before[:5], b"", b"GIF89a" * 9]:
        saved.write_bytes(content)
        with pytest.raises(ValueError, match=r"is damaged|has no digest"):
            load_tensors(saved)


def test_what_another_program_saved_is_told_from_what_it_saved_again(saved):
    tensors, _ = load_tensors(saved)
    with safetensors.safe_open(saved, "np") as file:
        described = file.metadata()
    safetensors.numpy.save_file(tensors, saved, metadata=described | {"format": "pt"})
    assert load_tensors(saved)[1] == METADATA
    safetensors.numpy.save_file(tensors | {"step": np.array(8, np.int32)}, saved, metadata=described)
    with pytest.raises(DamagedError, match="does not match its SHA-256"):
        load_tensors(saved)
    safetensors.numpy.save_file(tensors, saved)
    with pytest.raises(ValueError, match="has no digest: another program wrote it"):
        load_tensors(saved)
