"""A request to stop, by Ctrl-C or SIGTERM: collected and looked at between steps, so that everything is saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prgkit.errors import PrgkitError


class Interrupted(PrgkitError):  # noqa: N818 - nothing went wrong
    """The user, or the system, asked to stop; everything computed so far is saved."""

    exit_code = 130  # as after any SIGINT


@contextmanager
def stopping() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying of them; the loop looks between steps and saves.

    A second signal of the same kind ends the process as usual. In a thread nothing is collected: signals are the main
    thread's.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous: dict[int, Any] = {}

    def receive(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
