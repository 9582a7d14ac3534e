"""How files are written: under a temporary name in the same directory, synced, then renamed.

A reader sees the old file or the new one, never a part of one, whenever the writer is stopped. A writer holds a lock on
what it writes, and the kernel opens the lock when the writer dies, in whatever way. So what a killed writer has left
can be told from what a living one is at, and the next writer in the same directory removes it.
"""

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

# What the temporary names are like.
PARTIAL: re.Pattern[str] = re.compile(r"\..+-[0-9a-f]{8}\.partial")


def write_atomically(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file as a whole or not at all; missing parent directories are made.

    What killed writers have left in the directory is removed first.

    Args:
        path: Where to; an existing file is replaced, and its mode kept. Of a link, what it leads to is replaced.
        content: Bytes, or text that is encoded as UTF-8.

    Raises:
        TypeError: `content` is neither bytes nor text.
        OSError: The directory cannot be written, the disk is full, or what is there is no regular file, as a device is
            not; an existing file is left as it was.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "deep" / "note.txt"
    >>> write_atomically(path, "done")
    >>> path.read_text()
    'done'
    """
    if not isinstance(content, (bytes, str)):
        raise TypeError(f"content must be bytes or str, got {type(content).__name__}")
    path = Path(path)
    try:
        target = _resolved(path)
        if target.exists() and not target.is_file():
            number, found = (errno.EISDIR, "a directory") if target.is_dir() else (errno.EINVAL, "no regular file")
            raise OSError(number, f"this is {found}")
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_partial(target.parent)
        with _partial(target, directory=False) as (descriptor, temporary):
            # There may be no earlier file, or no modes on its file system. Before there is anything to read; and what
            # follows is written by the descriptor, because the mode may forbid to open the file.
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, stat.S_IMODE(target.stat().st_mode))
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.fsync(descriptor)
            temporary.replace(target)
    except OSError as error:
        what = f"{error.strerror}; this file was not written, and an earlier one is as it was"
        raise OSError(error.errno, what, str(path)) from error


@contextlib.contextmanager
def scratch_directory(parent: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a temporary directory inside another, on the same file system, and remove it at the end of the block.

    If the process is killed, the next writer in `parent` removes it.

    Args:
        parent: An existing directory.

    Yields:
        The empty directory.

    >>> import tempfile
    >>> parent = Path(tempfile.mkdtemp())
    >>> with scratch_directory(parent) as scratch:
    ...     write_atomically(scratch / "note.txt", "done")
    ...     _ = (scratch / "note.txt").rename(parent / "note.txt")
    >>> [entry.name for entry in parent.iterdir()]
    ['note.txt']
    """
    remove_partial(parent)
    with _partial(Path(parent) / "scratch", directory=True) as (_, temporary):
        yield temporary


def prepare_directory(path: str | os.PathLike[str]) -> Path:
    """Make a directory ready to be written into, so that a long run learns at its start that it is not.

    The directory is made if it is missing, a file is written and removed again, and what killed writers have left is
    removed.

    Args:
        path: The directory.

    Returns:
        The same, as a Path.

    Raises:
        OSError: No file can be written there.

    >>> import tempfile
    >>> prepare_directory(Path(tempfile.mkdtemp()) / "runs" / "first").is_dir()
    True
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        remove_partial(path)
        with _partial(path / "probe", directory=False):
            pass
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}; no files can be written into this directory", str(path)
        ) from error
    return path


def remove_partial(directory: str | os.PathLike[str]) -> None:
    """Remove what writers that were killed have left in a directory; what living ones are writing stays.

    Args:
        directory: Where; if it is missing or may not be changed, nothing happens.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> left = directory / ".note.txt-0123abcd.partial"
    >>> left.touch()
    >>> remove_partial(directory)
    >>> left.exists()
    False
    """
    with contextlib.suppress(OSError):
        for path in Path(directory).iterdir():
            if not PARTIAL.fullmatch(path.name):
                continue
            with contextlib.suppress(OSError):
                descriptor = _open(path)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    _remove(path)
                finally:
                    os.close(descriptor)


@contextlib.contextmanager
def locked(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Let one process at a time into the block, of all that name the same directory; the others wait.

    The lock leaves no file. A file system that has no locks lets everybody in.

    Args:
        directory: An existing directory.

    >>> import tempfile
    >>> with locked(tempfile.mkdtemp()):
    ...     print("alone")
    alone
    """
    descriptor = _open(Path(directory))
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _resolved(path: Path) -> Path:
    # Of links that lead to themselves Python 3.13 gives one back, and earlier ones raise RuntimeError.
    with contextlib.suppress(RuntimeError):
        resolved = path.resolve()
        if not resolved.is_symlink():
            return resolved
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))


@contextlib.contextmanager
def _partial(path: Path, *, directory: bool) -> Iterator[tuple[int, Path]]:
    """Make a locked temporary file or directory beside `path`, and remove it unless the block has renamed it."""
    descriptor, temporary = _made(path, directory)
    try:
        yield descriptor, temporary
    finally:
        _remove(temporary)
        os.close(descriptor)


def _made(path: Path, directory: bool) -> tuple[int, Path]:
    while True:
        temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}.partial")
        # Modes are left to the umask, so that the result is as readable as any other file that the user writes.
        if directory:
            temporary.mkdir()
        else:
            temporary.touch(exist_ok=False)
        try:
            descriptor = _open(temporary)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if temporary.exists():
            return descriptor, temporary
        # Before it was locked, another writer took it for a dead one's.
        os.close(descriptor)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
