"""The process: its exit codes, its signals, and streams that take any text, whatever the terminal has letters for."""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
import tempfile
import unicodedata

import click

from prgkit.errors import DiskFullError, PrgkitError
from prgkit.storage.atomic import is_disk_full

REFUSALS = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR)  # of the file system: nothing that we can mend
# What the texts of this project hold besides ASCII, for a terminal that does not: no letter of these is lost.
PLAIN = {
    "–": "-", "—": "-", "−": "-", "‑": "-", "×": "x", "·": "*", "•": "*", "±": "+-", "≈": "~", "≤": "<=", "≥": ">=",
    "≠": "!=", "→": "->", "←": "<-", "↑": "^", "↓": "v", "…": "...", "µ": "u", "μ": "u", "°": " deg", "√": "sqrt",
    "‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u202f": " ", "\u2009": " ", "✓": "yes", "✗": "no",
}  # fmt: skip


def run_process(cli: click.Group) -> None:
    """Run the command line; a user's mistake is told without a traceback (exit 1), a wrong call with usage (exit 2)."""
    take_any_text()
    if os.path.expanduser("~") == "~":  # no HOME, and no entry for the user: libraries would fail, or fill a folder "~"
        os.environ["HOME"] = tempfile.gettempdir()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a system that shuts down is told like Ctrl-C
    try:
        cli.main(prog_name="prgkit", standalone_mode=False)
    except click.ClickException as error:
        error.show(sys.stderr)
        sys.exit(error.exit_code)
    except click.Abort as abort:
        if isinstance(abort.__cause__, EOFError):  # nothing here asks a question, so this is a bug
            raise abort.__cause__ from None
        click.echo("Stopped. What was finished is kept; the same command goes on from there.", file=sys.stderr)
        sys.exit(130)
    except PrgkitError as error:
        sys.exit(print_error(error))
    except Exception as error:
        place = getattr(error, "filename", None)
        if is_disk_full(error):
            fix = "free some and run the same command again"
            sys.exit(print_error(DiskFullError("no disk space left", where=place, fix=fix)))
        if not isinstance(error, OSError) or error.errno not in REFUSALS or place is None:
            raise
        fix = "make it accessible, or work in another place, such as a copy of it"
        sys.exit(print_error(PrgkitError(str(error.strerror).lower(), where=place, fix=fix)))
    finally:
        signal.signal(signal.SIGTERM, before)


def take_any_text() -> None:
    """Let stdout and stderr take any text, whatever the terminal's encoding: what it lacks has a stand-in.

    Where one of them is closed, what is written to it is lost, and nothing else.
    """
    codecs.register_error("plain", in_plain_letters)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as the process
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="plain")


def in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """Handle an encoding error by stand-ins, as `codecs.register_error` asks for."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    missing = error.object[error.start : error.end]
    return "".join(map(plain, missing)), error.end


def plain(letter: str) -> str:
    """Return what stands for a letter: ASCII where there is a usual way, else its escape."""
    if letter in PLAIN:
        return PLAIN[letter]
    if "\u2500" <= letter <= "\u259f":  # lines, boxes and blocks
        return "|" if "VERTICAL" in unicodedata.name(letter, "") else "#" if letter >= "\u2580" else "-"
    return letter.encode("ascii", "backslashreplace").decode()


def takes_any_letter() -> bool:
    """Tell whether stdout is in an encoding that has every letter."""
    return (sys.stdout.encoding or "utf-8").lower().replace("-", "").startswith("utf")


def print_error(error: PrgkitError) -> int:
    """Print an error and return the exit code; having been stopped is none, and says so itself."""
    text = str(error)
    click.echo(f"Error: {text}" if error.exit_code == 1 else text[0].upper() + text[1:], file=sys.stderr)
    return error.exit_code
