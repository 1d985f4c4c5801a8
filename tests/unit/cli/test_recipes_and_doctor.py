"""What `recipes` lists and what `doctor` says of this machine."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

from prgkit.config.objectives import OBJECTIVES
from prgkit.config.recipe import shipped_recipes
from tests.conftest import PrgkitCommand

NO_TORCH = SimpleNamespace(returncode=1, stdout="", stderr="")  # what a broken torch does; asking takes seconds


def test_recipes(prgkit: PrgkitCommand) -> None:
    listed = prgkit("recipes").out
    assert [line.split()[0] for line in listed.splitlines() if line[2] != " "] == list(shipped_recipes())
    assert "cifar100      Distil CLIP ViT-L/14 into RepViT-M1.1 on CIFAR-100.\n" in listed
    page = shipped_recipes()["custom"].read_text()
    assert prgkit("recipes", "--show", "custom").out == page
    assert prgkit("recipes", "--show", "custom", "--json").json == {"recipes": {"custom": page}}
    objectives = prgkit("recipes", "--objectives").out
    assert [line.split()[0] for line in objectives.splitlines() if line[2] != " "] == list(OBJECTIVES)
    assert "  ce          Cross-entropy with the teacher's pseudo-labels. Use: As the floor:" in objectives
    assert prgkit("recipes", "--show", "custum").err.startswith(
        "Error: unknown recipe 'custum'; did you mean 'custom'?\n"
    )


def test_doctor_is_aligned_and_tells_extras_with_their_brackets(
    prgkit: PrgkitCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prgkit.cli.doctor as doctor

    versions = dict.fromkeys(doctor.PACKAGES) | {"onnxruntime": "1.20", "onnxruntime-gpu": "1.20"}
    monkeypatch.setattr(doctor, "version_of", versions.get)
    result = prgkit("doctor")
    assert (result.code, result.err) == (0, "")
    lines = result.out.splitlines()
    assert all(line == line.rstrip() and (len(line) <= 80 or line.startswith("clash")) for line in lines)
    rows = lines[lines.index("backends") + 1 :]
    assert any(re.fullmatch(r"  no   torch \(distill, export\) +pip install 'prgkit\[distill\]'", row) for row in rows)
    assert any(line.startswith("  yes  onnxruntime CPU") for line in rows)
    assert lines[-1].startswith("clash: onnxruntime is installed over onnxruntime-gpu")
    assert "  torch                 not installed" in lines
    document = prgkit("doctor", "--json").json["doctor"]
    assert set(document) == {"versions", "machine", "backends", "clashes"}
    assert all(set(row) == {"name", "runs", "detail"} for row in document["backends"])


def test_doctor_tells_building_engines_from_running_them(
    prgkit: PrgkitCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prgkit.export.runtimes.gpu import Backend, Gpu

    found = {"tensorrt": Backend("tensorrt", None, "not installed; pip"), "tensorrt_rtx": Backend("rtx", "1.7", None)}
    monkeypatch.setattr("prgkit.export.runtimes.tensorrt.probe_backend", found.get)
    monkeypatch.setattr("prgkit.export.runtimes.pytorch.subprocess.run", lambda *_, **__: NO_TORCH)

    def engines() -> dict[str, str]:
        rows = prgkit("doctor", "--json").json["doctor"]["backends"]
        return {row["name"]: row["detail"] for row in rows if "engines" in row["name"]}

    monkeypatch.setattr("prgkit.export.runtimes.tensorrt.find_gpu", lambda: None)
    assert engines() == {
        "tensorrt: build engines": "not installed; pip",
        "tensorrt: run engines": "not installed; pip",
        "tensorrt_rtx: build engines": "",
        "tensorrt_rtx: run engines": "it needs an NVIDIA GPU and its driver",
    }
    monkeypatch.setattr("prgkit.export.runtimes.tensorrt.find_gpu", lambda: Gpu("some GPU", "SM89"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    assert engines()["tensorrt_rtx: run engines"].startswith("cuda-python is not installed: pip install cuda-python")


def test_doctor_survives_a_broken_onnxruntime(prgkit: PrgkitCommand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setattr("prgkit.export.runtimes.pytorch.subprocess.run", lambda *_, **__: NO_TORCH)
    result = prgkit("doctor")
    assert result.code == 0
    assert "no   onnxruntime " in result.out
