"""SIGTERM and SIGINT: save a checkpoint, say how to go on, and leave."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from rlhf.engine.world import World


class Interrupted(KeyboardInterrupt):
    """A signal ended the training; the message says where it can be taken up again.

    Attributes:
        signal_number: Which signal it was.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequested(Exception):
    """A signal has come; raised at the next place where a training can stop."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"signal {signal_number}")
        self.signal_number = signal_number


class Interruption:
    """Notes signals while a training runs; a context manager.

    A second SIGINT ends the process at once, as it always did. Outside the main thread, where
    Python sets no handlers, and outside the context, ``check`` never raises.
    """

    def __init__(self) -> None:
        self.world = World()
        self.active = False
        self._received = 0
        self._earlier: dict[int, Any] = {}

    def check(self) -> None:
        """Stop here if a signal has come to any rank. Every rank must ask.

        Raises:
            StopRequested: It has.
        """
        if not self.active:
            return
        received = max(self.world.gather(self._received))
        if received:
            raise StopRequested(received)

    def __enter__(self) -> Interruption:
        self._received = 0
        self.active = True
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.active = False
        while self._earlier:
            signal.signal(*self._earlier.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
