"""A converter at work in a process of its own: what it prints, patches and keeps in memory ends with it."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from prgkit.errors import ExportError, one_line
from prgkit.native_output import redirect_output
from prgkit.workers import no_main_script

FIX = "export without this format; what was finished is kept"
PATIENCE_S = 10  # for a process whose work is done to clean up


def run_apart(function: Callable[..., None], *arguments: Any) -> None:
    """Run ``function(*arguments)``, a function of a module, in a process that starts anew.

    It is gone when this returns, raises, or is killed.

    Raises:
        ExportError: the function raised something, or its process died; says what, or the last line that was printed.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.NamedTemporaryFile(prefix="prgkit-convert-", suffix=".log") as log:
        process = context.Process(target=_work, args=(theirs, log.name, function, arguments), daemon=True)
        try:
            with no_main_script():
                process.start()
            theirs.close()  # so that its death reads as the end of the pipe
            with suppress(EOFError):
                failure = ours.recv()
                process.join(PATIENCE_S)
                if failure:
                    raise ExportError(f"the converter failed: {failure}", fix=FIX)
                return
            process.join()
            printed = Path(log.name).read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(printed) if line.strip()), "it printed nothing")
            raise ExportError(f"the converter ended with exit code {process.exitcode}: {last}", fix=FIX)
        finally:
            ours.close()
            process.kill()
            process.join()


def _work(pipe: Connection, log: str, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Do the work, and send what went wrong, or nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends this process
    redirect_output(log)
    threading.Thread(target=_end_with_parent, args=(pipe,), daemon=True).start()
    try:
        function(*arguments)
    except Exception as error:
        pipe.send(one_line(error) or type(error).__name__)
    else:
        pipe.send("")


def _end_with_parent(pipe: Connection) -> None:
    """End this process as soon as nobody waits for its work: nothing is ever sent here but the end of the pipe."""
    with suppress(EOFError, OSError):
        pipe.recv()
    os._exit(1)
