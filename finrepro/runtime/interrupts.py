"""Interrupts that wait: what must not be cut short (a database that is being made) is ended
first, and the interrupt comes then.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def held_back() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM are noted; the last of them acts at the end, also where something
    was raised: whoever handles that would go on. In another thread nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    noted: list[tuple[int, FrameType | None]] = []
    handlers = {
        number: signal.signal(number, lambda number, frame: noted.append((number, frame)))
        for number in HELD
    }
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if noted:
            signal.raise_signal(noted[-1][0])
