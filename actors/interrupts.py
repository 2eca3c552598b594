"""Ctrl-C and SIGTERM, collected instead of raised in the middle of something. For launchers."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Yields the numbers of the signals that have come so far; the handlers are put back."""
    before = {number: signal.getsignal(number) for number in INTERRUPTS}
    seen: list[int] = []
    note_signals(seen)
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def note_signals(seen: list[int]) -> None:
    """From now on, also where something else has put its handlers in place."""

    def note(number: int, _frame: FrameType | None) -> None:
        seen.append(number)

    for number in INTERRUPTS:
        signal.signal(number, note)
