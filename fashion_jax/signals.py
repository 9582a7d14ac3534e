"""Ctrl-C and SIGTERM, taken note of instead of obeyed at once."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

logger: logging.Logger = logging.getLogger(__name__)
_noted: ContextVar[list[int] | None] = ContextVar("noted", default=None)


@contextlib.contextmanager
def noting_signals(*, terminate: bool) -> Iterator[list[int]]:
    """Let the first Ctrl-C only take note, in the list that this yields; a second one interrupts.

    So what is under way is not lost. A Ctrl-C after a SIGTERM interrupts too; a second SIGTERM does not. Inside another
    such block the list is that of the outer one: so a loop over runs knows that a run was interrupted, and a second
    Ctrl-C in a later run is a second one. A SIGTERM that was noted ends the process where the outermost block ends; if
    that is by an error, it is logged before. The main thread alone may change handlers, and a handler that somebody
    else has set is left as it is.

    Args:
        terminate: Take note of SIGTERM too.

    >>> _ = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background jobs do not have
    >>> with noting_signals(terminate=False) as noted:
    ...     for run in range(3):
    ...         with noting_signals(terminate=False):
    ...             signal.raise_signal(signal.SIGINT)
    ...         if noted:
    ...             break
    >>> run
    0
    """
    outer = _noted.get()
    noted = [] if outer is None else outer

    def note(number, frame):
        noted.append(number)
        # A SIGTERM to a group comes twice, from whoever sent it and from a parent such as make that passes it on.
        if len(noted) > 1 and number == signal.SIGINT:
            raise KeyboardInterrupt

    defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    if terminate:
        defaults[signal.SIGTERM] = signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread():
        defaults = {}
    ours = {number: default for number, default in defaults.items() if signal.getsignal(number) is default}
    for number in ours:
        signal.signal(number, note)
    token = _noted.set(noted)
    error = None
    try:
        yield noted
    except BaseException as caught:
        error = caught
        raise
    finally:
        _noted.reset(token)
        for number, default in ours.items():
            signal.signal(number, default)
        if noted[:1] == [signal.SIGTERM] and signal.SIGTERM in ours:
            if isinstance(error, KeyboardInterrupt):
                logger.warning("interrupted after a SIGTERM, which ends the process now")
            elif error is not None:
                logger.error("an error ended the run after a SIGTERM, which ends the process now", exc_info=error)
            signal.raise_signal(signal.SIGTERM)
