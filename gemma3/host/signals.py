"""Signals that end the program: Ctrl-C, ``kill``, a closed terminal. All three unwind it as Ctrl-C does."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Arrived:
    """Signals belong to the whole process, and so does the number of the first one that arrived."""

    number: int | None = None


def ended_by() -> int | None:
    """The number of the signal that ends the program; None while none has arrived."""
    return _Arrived.number


def note(number: int) -> None:
    """Remember that the signal ``number`` ends the program. For code that handles signals itself."""
    _Arrived.number = _Arrived.number or number


@contextmanager
def ending_signals() -> Iterator[None]:
    """Within the block, each of ENDING raises KeyboardInterrupt in the main thread.

    A signal that is ignored stays so: nohup ignores SIGHUP. Once one has arrived, only Ctrl-C interrupts again, so that
    the second signal of a closing terminal does not interrupt the cleaning up.
    """

    def stop(number: int, _: FrameType | None) -> None:
        if _Arrived.number is not None and number != signal.SIGINT:
            return
        _Arrived.number = _Arrived.number or number
        raise KeyboardInterrupt

    former: dict[int, Any] = {}
    _Arrived.number = None
    if threading.current_thread() is threading.main_thread():  # no other thread may set handlers
        former = {number: signal.signal(number, stop) for number in ENDING if is_heeded(number)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def is_heeded(number: int) -> bool:
    """False for a signal that whoever started the program wants ignored."""
    return signal.getsignal(number) not in (signal.SIG_IGN, None)
