"""Runs the command line in forks of a process that has imported it, and kills them where it is told to.

One line of JSON on stdin is one command: {"cwd", "line", "trap"}; one line on stdout is its process id. A trap names a
function, which of its calls is meant, and what becomes of it: the process gets SIGKILL "before" it, "after" it, or
"within" it, when half of what it writes is on the disk, or once it and its child processes have computed for some
seconds; or it is asked to "stop", by SIGTERM, and goes on. With "full" the call finds no space on the disk, with "skip"
it does nothing, with "remove PATTERN" the files of that name are gone before it. The package itself knows nothing of
this.
"""

import errno
import importlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def tear(path: Path) -> None:
    """Cut a file in half and end."""
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
        os.fsync(file.fileno())
    die()


def tear_line(journal: Any, record: Any) -> None:
    """Append half a record and end."""
    if hasattr(record, "packed"):
        line = record.packed()
    else:
        line = json.dumps(record if isinstance(record, dict) else record.model_dump()).encode()
    with open(journal.path, "ab") as file:
        file.write(line[: len(line) // 2])
        file.flush()
        os.fsync(file.fileno())
    die()


def die_after(seconds: float) -> None:
    """Die when this process and its children have computed for so long: on a busy machine later than by the clock."""
    until = computed_s() + seconds
    while computed_s() < until:
        time.sleep(0.01)
    die()


def computed_s() -> float:
    """Return the processor time of this process and of its children that live, with all of their threads."""
    spent = time.process_time()
    for children in Path("/proc/self/task").glob("*/children"):
        for child in children.read_text().split():
            user, system = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[11:13]
            spent += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return spent


def set_trap(place: str, call: int, when: str | float) -> None:
    """Put the trap around ``module:name`` or ``module:Class.name``; of a class that a module imports, in it alone."""
    module, _, path = place.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for one in owners:
        if isinstance(getattr(owner, one), type) and getattr(owner, one).__module__ != module:
            setattr(owner, one, type(one, (getattr(owner, one),), {}))
        owner = getattr(owner, one)
    original, calls = getattr(owner, name), 0

    def trapped(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != call:
            return original(*arguments, **named)
        if when == "before":
            die()
        if when == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
            return original(*arguments, **named)
        if when == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if when == "skip":
            return None
        if isinstance(when, str) and when.startswith("remove "):
            for path in Path().glob(when.removeprefix("remove ")):
                path.unlink()
            return original(*arguments, **named)
        if when == "within" and name == "append":
            tear_line(*arguments)
        if not isinstance(when, str):
            threading.Thread(target=die_after, args=(when,), daemon=True).start()
        result = original(*arguments, **named)
        if when == "within":  # a function whose second argument is the file that it writes
            tear(Path(arguments[1]))
        die()
        return result

    setattr(owner, name, trapped)


def main() -> None:
    import open_clip  # noqa: F401

    import prgkit.cli.main
    import prgkit.evaluate.bench.bench
    import prgkit.export.from_run
    import prgkit.training.distill

    print("ready", flush=True)
    for text in sys.stdin:
        order = json.loads(text)
        if (process := os.fork()) == 0:
            os.setsid()
            os.chdir(order["cwd"])
            for number, name in ((0, os.devnull), (1, order["out"]), (2, order["out"])):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644), number)
            if order["trap"]:
                set_trap(*order["trap"])
            sys.argv = ["prgkit", *order["line"]]
            code = 0
            try:
                prgkit.cli.main.main()
            except SystemExit as end:
                code = int(end.code or 0)
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 70
            sys.stdout.flush()
            os._exit(code)
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
