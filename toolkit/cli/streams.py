"""The process's own streams: stdout and stderr take any text, whatever the terminal's encoding has letters for."""

from __future__ import annotations

import codecs
import io
import os
import sys
import unicodedata

import click

from prgkit.errors import PrgkitError

# What the texts of this project hold besides ASCII, for a terminal that does not: no letter of these is lost.
PLAIN = {
    "–": "-", "—": "-", "−": "-", "‑": "-", "×": "x", "·": "*", "•": "*", "±": "+-", "≈": "~", "≤": "<=", "≥": ">=",
    "≠": "!=", "→": "->", "←": "<-", "↑": "^", "↓": "v", "…": "...", "µ": "u", "μ": "u", "°": " deg", "√": "sqrt",
    "‘": "'", "’": "'", "“": '"', "”": '"', "\u00a0": " ", "\u202f": " ", "\u2009": " ", "✓": "yes", "✗": "no",
}  # fmt: skip


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
