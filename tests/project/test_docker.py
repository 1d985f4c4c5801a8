"""The Dockerfiles, as far as they can be checked without docker: what they copy, install and start is there."""

from __future__ import annotations

import fnmatch
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import pyproject

ROOT = Path(__file__).parents[2]
KNOWN = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT", "CMD"}


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.device"])
def test_what_a_dockerfile_names_is_there(name: str) -> None:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    steps = [line.partition(" ")[::2] for line in lines]
    assert {step for step, _ in steps} <= KNOWN
    assert steps[0] == ("FROM", next(rest for step, rest in steps if step == "FROM"))
    copied = [
        word for step, rest in steps if step == "COPY" and "--from" not in rest for word in shlex.split(rest)[:-1]
    ]
    assert [path for path in copied if not (ROOT / path).exists()] == []
    folders = {place.split("/")[0] for place in pyproject()["tool"]["setuptools"]["package-dir"].values()}
    assert folders | {"pyproject.toml", "README.md", "LICENSE"} == set(copied)
    let_in = {line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] == "!"}
    assert [path for path in copied if not any(fnmatch.fnmatch(path, pattern) for pattern in let_in)] == []
    extras = {
        extra for _, rest in steps for listed in re.findall(r"\[([\w,-]+)\]", rest) for extra in listed.split(",")
    }
    assert extras
    assert extras <= pyproject()["project"]["optional-dependencies"].keys()
    assert ("distill" in extras) == (name == "Dockerfile")  # the device's has no torch
    assert ("ENTRYPOINT", '["prgkit"]') in steps
    assert "prgkit" in pyproject()["project"]["scripts"]
