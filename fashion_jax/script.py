"""How a script begins and ends: its log on standard error, its errors in one line, the conventional exit status."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

INTERRUPTED = 130
# What a user can mend. Anything else is a mistake of ours, and keeps its traceback.
EXPECTED = (ValueError, TypeError, OSError, MemoryError, FloatingPointError, ModuleNotFoundError)


class _Lasting:
    """A stream that outlives its reader: what can no longer be written, to a closed pipe or a full disk, is dropped.

    A run of hours must not end, and its files must not be missing, because nobody reads its progress any more.
    """

    def __init__(self, stream: Any):
        # Whoever started the process may have closed it.
        self._stream = stream or Path(os.devnull).open("w")  # noqa: SIM115
        self.error: OSError | None = None
        if hasattr(self._stream, "reconfigure"):
            self._stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            self.error = self.error or error
            # Python writes what is left in the buffer when it ends, and would fail there.
            with contextlib.suppress(OSError), Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())


def run_script(main: Callable[[Any], int], read_flags: Callable[[], Any]) -> NoReturn:
    """Read a script's flags, run its main function, and exit.

    Help and errors are coloured on a terminal only, and not where the environment variable NO_COLOR is set. What is
    printed and cannot be written is dropped: `main` goes on. If it was a result, for a disk that is full, that is said
    at the end; a pipe's reader that stops reading means it.

    Args:
        main: Takes the flags and returns the exit status.
        read_flags: Gives the flags. If they have a `checkpoint`, whoever interrupts is told that the run goes on from
            there.

    Raises:
        SystemExit: Always; with the status of `main`, or 1 and one line on standard error.

    >>> run_script(lambda flags: flags, lambda: 3)
    Traceback (most recent call last):
    SystemExit: 3
    """
    output, errors = _Lasting(sys.stdout), _Lasting(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):  # pyright: ignore[reportArgumentType]
        if os.environ.get("NO_COLOR") or not (sys.stdout.isatty() and sys.stderr.isatty()):
            # tyro does not know NO_COLOR, and looks at standard output alone; a terminal that knows no colours it
            # respects.
            os.environ["TERM"] = "dumb"
        flags = read_flags()
        logging.basicConfig(format="%(message)s")
        logging.getLogger("fashion_jax").setLevel(logging.INFO)
        try:
            status = main(flags)
            output.flush()
        except EXPECTED as error:
            status = _failed(error)
        except KeyboardInterrupt:
            checkpoint = getattr(flags, "checkpoint", None)
            rest = f"the same command goes on from {checkpoint}" if checkpoint else "results are missing or incomplete"
            print(f"stopped at once; {rest}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            # An orderly exit waits for the compiled program that is under way, which may be a long epoch.
            os._exit(INTERRUPTED)
        if output.error is not None and not isinstance(output.error, BrokenPipeError):
            status = _failed(f"not all could be written to standard output: {output.error}")
    sys.exit(status)


def _failed(error: object) -> int:
    print(f"error: {str(error) or repr(error)}", file=sys.stderr, flush=True)
    return 1
