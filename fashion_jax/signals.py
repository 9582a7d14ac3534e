"""Ctrl-C and SIGTERM, taken note of instead of obeyed at once."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def noting_signals(*, terminate: bool) -> Iterator[list[int]]:
    """Let the first Ctrl-C only take note, in the list that this yields; a second one interrupts.

    So what is under way is not lost. The main thread alone may change handlers, and a handler that somebody
    else has set is left as it is.

    Args:
        terminate: Take note of SIGTERM too.

    >>> with noting_signals(terminate=True) as noted:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     noted == [signal.SIGTERM]
    True
    """
    noted: list[int] = []

    def note(number, frame):
        noted.append(number)
        if len(noted) > 1:
            raise KeyboardInterrupt

    defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
    if terminate:
        defaults[signal.SIGTERM] = signal.SIG_DFL
    if threading.current_thread() is not threading.main_thread():
        defaults = {}
    ours = {number: default for number, default in defaults.items() if signal.getsignal(number) is default}
    for number in ours:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, default in ours.items():
            signal.signal(number, default)
