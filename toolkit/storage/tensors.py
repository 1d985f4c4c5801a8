"""Tensors and JSON facts as one safetensors file with a digest of itself: whole, or found out; nothing is pickled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from prgkit.storage.atomic import guarding_space, writing


def save_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, JsonValue]) -> None:
    """Write tensors and JSON facts as one safetensors file, atomically."""
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size_bytes = sum(tensor.nbytes for tensor in contiguous.values())
    # One entry in the header: safetensors writes several in any order, and equal students should be equal files.
    header = json.dumps({**facts, "digest": digest_of(contiguous, facts)})
    with writing(path) as temporary, guarding_space(path, size_bytes):
        save_file(contiguous, temporary, metadata={"facts": header})


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, JsonValue]]:
    """Read what `save_tensors` wrote: the tensors, and the facts.

    Raises:
        SafetensorError: the header is damaged, or the file ends too early.
        ValueError: something else in it is not what was written.
        OSError: it cannot be read.
    """
    with open_tensors(path) as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    facts = json.loads(header.get("facts", "null"))
    if not isinstance(facts, dict):
        raise ValueError("its header is not what was written")
    if facts.pop("digest", None) != digest_of(tensors, facts):
        raise ValueError("its content is not what was written")
    return tensors, facts


def load_facts(path: Path) -> dict[str, JsonValue]:
    """Read the facts alone."""
    with open_tensors(path) as file:
        facts: dict[str, JsonValue] = json.loads((file.metadata() or {}).get("facts", "{}"))
    return {name: value for name, value in facts.items() if name != "digest"}


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file; safetensors itself says of every file that it cannot read that it is not there."""
    with open(path, "rb"):
        pass
    with safe_open(path, framework="pt") as file:
        yield file


def digest_of(tensors: dict[str, Tensor], facts: dict[str, JsonValue]) -> str:
    """Return 32 hex digits that change with any name, type, shape or value, and with the facts.

    safetensors itself checks that its header fits its length, and nothing of what the tensors hold.
    """
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
