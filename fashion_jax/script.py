"""How a script begins and ends: its log on standard error, its errors in one line, the conventional exit status."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any, NoReturn

INTERRUPTED = 130
# What a user can mend. Anything else is a mistake of ours, and keeps its traceback.
EXPECTED = (ValueError, TypeError, OSError, MemoryError, FloatingPointError)


def run_script(main: Callable[[Any], int], read_flags: Callable[[], Any]) -> NoReturn:
    """Read a script's flags, run its main function, and exit.

    Help and errors are coloured on a terminal only, and not where the environment variable NO_COLOR is set.

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
    if os.environ.get("NO_COLOR") or not (sys.stdout.isatty() and sys.stderr.isatty()):
        # tyro does not know NO_COLOR, and looks at standard output alone; a terminal that knows no colours it respects.
        os.environ["TERM"] = "dumb"
    flags = read_flags()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("fashion_jax").setLevel(logging.INFO)
    try:
        sys.exit(main(flags))
    except EXPECTED as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        checkpoint = getattr(flags, "checkpoint", None)
        rest = f"the same command goes on from {checkpoint}" if checkpoint else "results are missing or incomplete"
        print(f"stopped at once; {rest}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        # An orderly exit waits for the compiled program that is under way, which may be a long epoch.
        os._exit(INTERRUPTED)
