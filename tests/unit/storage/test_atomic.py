"""Files with a digest of themselves: whichever bit flips, what is read is what was written, or it is said not to be."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from prgkit.errors import PrgkitError
from prgkit.storage.atomic import cache_folder, mapped, read_sealed, require_space, write_json, write_sealed
from prgkit.storage.journal import Journal


def flips(path: Path, read: Any, *errors: type[Exception]) -> tuple[int, int]:
    """Flip bits of a file one at a time; return how many were found out, and how many changed what was read."""
    whole, expected = path.read_bytes(), read(path)
    found = unseen = 0
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1 << (place % 8)
        path.write_bytes(content)
        try:
            unseen += read(path) != expected
        except (PrgkitError, *errors):
            found += 1
    path.write_bytes(whole)
    return found, unseen


def test_any_flipped_bit_of_a_sealed_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    write_sealed(path, {"teacher": "é", "width": 512, "scale": 100.0, "nested": {"b": [1, None, True]}, "a": "x"})
    found, unseen = flips(path, read_sealed)
    assert unseen == 0
    assert found > 0.8 * path.stat().st_size  # the rest fell on blanks between values


def test_a_name_that_is_not_utf_8_can_be_written_down(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"command": "prgkit bench --run caf\udce9"})
    assert (tmp_path / "a.json").read_bytes() == b'{\n  "command": "prgkit bench --run caf\\udce9"\n}\n'


def test_any_flipped_bit_of_a_file_of_tensors_is_found(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors import SafetensorError

    from prgkit.storage.tensors import load_tensors, save_tensors

    path = tmp_path / "state.safetensors"
    tensors = {"a": torch.arange(60.0).view(3, 20), "b": torch.tensor(7), "c": torch.ones(9, dtype=torch.bool)}
    save_tensors(path, tensors, {"step": 3, "best": 0.1 + 0.2})

    def read(path: Path) -> tuple[list[tuple[Any, ...]], dict[str, Any]]:
        found, facts = load_tensors(path)
        return [(name, one.dtype, one.tolist()) for name, one in sorted(found.items())], facts

    found, unseen = flips(path, read, SafetensorError, ValueError)
    assert unseen == 0
    assert found > 0.9 * path.stat().st_size


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EPERM, errno.ENODEV])
def test_a_disk_that_knows_less_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("os.fsync", "os.chmod", "numpy.memmap", "shutil.disk_usage"):
        monkeypatch.setattr(name, refuse)
    write_json(tmp_path / "a.json", [1])
    Journal(tmp_path / "a.jsonl", dict[str, int]).append({"a": 1})
    assert (tmp_path / "a.json").read_text() == "[\n  1\n]\n"
    assert (tmp_path / "a.jsonl").read_text() == '{"a": 1}\n'
    assert mapped(tmp_path / "a.jsonl", "u1", (2, 4)).tobytes() == b'{"a": 1}'
    require_space(tmp_path, 1 << 60, "the run")


def test_a_disk_that_fails_is_not_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_json(tmp_path / "a.json", [1])
    assert list(tmp_path.iterdir()) == []


def test_where_nobody_is_at_home_the_cache_is_temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("shards") == tmp_path / "prgkit" / "shards"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_folder() == Path("/home/someone/.cache/prgkit")
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    assert cache_folder() == Path(tempfile.gettempdir()) / "prgkit"
