"""How files are written: under a temporary name in the same directory, synced, then renamed.

A reader sees the old file or the new one, never a part of one, whenever the writer is stopped.
"""

import os
import tempfile
from pathlib import Path


def write_atomically(path: str | os.PathLike, content: bytes | str) -> None:
    """Write a file as a whole or not at all; missing parent directories are made.

    Args:
        path: Where to; an existing file is replaced.
        content: Bytes, or text that is encoded as UTF-8.

    Raises:
        OSError: The directory cannot be written, or the disk is full; an existing file is left as it was.

    >>> path = Path(tempfile.mkdtemp()) / "deep" / "note.txt"
    >>> write_atomically(path, "done")
    >>> path.read_text()
    'done'
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            # mkstemp makes private files; this one is to be as readable as any other that the user writes.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
