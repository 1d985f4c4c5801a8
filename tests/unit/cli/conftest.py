"""The commands without their work."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from prgkit.cli.main import cli


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any]]]:
    """Replace the work of every command by a note of what it was called with."""
    made: list[tuple[str, dict[str, Any]]] = []

    def noting(name: str) -> Callable[..., Any]:
        def note(**given: Any) -> dict[str, Any]:
            made.append((name, given))
            print("a library that prints")
            return {"did": name}

        return note

    for name, command in cli.commands.items():
        monkeypatch.setattr(command, "callback", noting(name))
    tensorrt = "prgkit.export.formats.tensorrt"
    monkeypatch.setattr(f"{tensorrt}.choose_backend", lambda name=None: SimpleNamespace(name="none"))
    monkeypatch.setattr(f"{tensorrt}.choose_targets", lambda backend, asked: asked)
    return made
