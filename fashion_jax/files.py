"""Files that are whole or absent: written under a temporary name, synced, then renamed; tensors carry a digest."""

import contextlib
import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from fashion_jax import _checks

ENTRY = "fashion_jax"  # Of a safetensors file's metadata, to which other programs add their own.


class DamagedError(ValueError):
    """A file whose content does not match its digest, or cannot be parsed."""


def write(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file whole or not at all; missing parent directories are made.

    Args:
        path: Where to; an existing file is replaced.
        content: Bytes, or text that is encoded as UTF-8.

    Raises:
        OSError: The file cannot be written; an existing one is left as it was.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "deep" / "note.txt"
    >>> write(path, "done")
    >>> path.read_text()
    'done'
    """
    target = _checks.path("path", path)
    try:
        # A link keeps leading to the file, which may lie on another file system.
        target = target.resolve() if target.is_symlink() else target
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary(target) as partial:
            with partial.open("wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; not written, an existing file is intact", str(target)) from error


@contextlib.contextmanager
def temporary(target: Path) -> Iterator[Path]:
    """Yield a name beside the target, and remove what is left there at the end.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "note.txt"
    >>> with temporary(target) as partial:
    ...     _ = partial.write_text("half")
    >>> list(target.parent.iterdir())
    []
    """
    partial = target.with_name(f".{target.name[:100]}-{secrets.token_hex(4)}.partial")
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def save_tensors(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays as one safetensors file, with a SHA-256 over names, types, shapes, bytes and metadata.

    Args:
        path: Where to; an existing file is replaced as a whole.
        tensors: Name and array of each entry.
        metadata: Text that goes with them.

    Raises:
        OSError: The file cannot be written; an existing one is left as it was.
        TypeError: An array has a type that could not be read back, such as complex numbers.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "ones.safetensors"
    >>> save_tensors(path, {"ones": np.ones(3)}, {"note": "three"})
    >>> tensors, metadata = load_tensors(path)
    >>> tensors["ones"].tolist(), metadata["note"]
    ([1.0, 1.0, 1.0], 'three')
    """
    import safetensors.numpy

    tensors = {name: _storable(name, array) for name, array in tensors.items()}
    # One entry, because safetensors writes several in random order: the same content is the same file.
    described = json.dumps({**metadata, "sha256": digest(tensors, metadata)}, ensure_ascii=False, sort_keys=True)
    write(path, safetensors.numpy.save(tensors, {ENTRY: described}))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a file of `save_tensors` and verify its digest.

    Returns:
        Name and array of each entry, and the metadata.

    Raises:
        OSError: The file cannot be read.
        DamagedError: It is damaged, or no safetensors file.
        ValueError: It has no digest: another program wrote it.
    """
    import safetensors

    content = _checks.path("path", path).read_bytes()
    try:
        entries = safetensors.deserialize(content)
        tensors = {name: _as_array(**entry) for name, entry in entries}
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata = json.loads((header.get("__metadata__") or {}).get(ENTRY, "{}"))
    except Exception as error:  # A damaged header makes safetensors, NumPy and json raise their own.
        raise DamagedError(f"{path} is damaged, or no safetensors file: {error}") from error
    if "sha256" not in metadata:
        raise ValueError(f"{path} has no digest: another program wrote it")
    if metadata.pop("sha256") != digest(tensors, metadata):
        raise DamagedError(f"{path} is damaged: its content does not match its SHA-256")
    return tensors, metadata


def digest(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> str:
    """Return the SHA-256 of named arrays and metadata.

    >>> digest({"a": np.ones(3)}) == digest({"a": np.zeros(3)})
    False
    """
    total = hashlib.sha256(json.dumps(sorted((metadata or {}).items())).encode())
    for name, array in sorted(tensors.items()):
        total.update(json.dumps([name, array.dtype.name, array.shape]).encode())
        total.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _storable(name: str, array: np.ndarray) -> np.ndarray:
    # The format keeps neither strides nor byte order, and safetensors would write an array's memory as it lies.
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(np.shape(array))
    if not re.fullmatch(r"bool|bfloat16|float(16|32|64)|u?int(8|16|32|64)", array.dtype.name):
        raise TypeError(f"{name} has the type {array.dtype}, which cannot be saved")
    return array


def _as_array(dtype: str, shape: list[int], data: bytes | bytearray) -> np.ndarray:
    """Return one entry of a safetensors file; unlike safetensors.numpy, of bfloat16 too."""
    kind = dtype.rstrip("0123456789")
    name = {"F": "float", "BF": "bfloat", "I": "int", "U": "uint", "BOOL": "bool"}[kind] + dtype[len(kind) :]
    return np.frombuffer(data, ml_dtypes.bfloat16 if name == "bfloat16" else name).reshape(shape)
