"""One of several parts of a teacher's pass: which part, of how many, from an option or from the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from prgkit.errors import PrgkitError

BLOCK_IMAGES = 256  # neighbours in a source that one shard takes together


class Shard(NamedTuple):
    """A part of the images: ``number`` of ``total``, counted from 0."""

    number: int
    total: int

    @property
    def folder(self) -> str:
        """The name of its folder in a target store."""
        return f"{self.number:05d}-of-{self.total:05d}"

    def __str__(self) -> str:
        return f"{self.number}/{self.total}"


WHOLE = Shard(0, 0)  # no part: what one process embeds alone
NOTHING = Shard(-1, 1)  # none of the images, for whoever needs no more than their listing


def parse_shard(text: str) -> Shard:
    """Read ``i/n``, or ``auto``: from what Slurm and torchrun say of this process.

    Raises:
        ValueError: it is neither, or there is no such part.
        PrgkitError: ``auto``, and nothing says which part this is.
    """
    if text == "auto":
        return shard_of_process(os.environ)
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ValueError("is neither i/n, such as 0/8, nor auto")
    number, count = int(match[1]), int(match[2])
    if not number < count:
        raise ValueError(f"does not exist: shards are counted from 0, so the last of {count} is {count - 1}/{count}")
    return Shard(number, count)


def shard_of_process(environment: Mapping[str, str]) -> Shard:
    """Return the part of this process: of a Slurm array, of torchrun's or srun's processes, or of both.

    Raises:
        PrgkitError: none of them started it, or the array has gaps.
    """
    shard = Shard(0, 1)
    found = False
    if "SLURM_ARRAY_TASK_ID" in environment:
        first, last, step, count = (
            int(environment.get(f"SLURM_ARRAY_TASK_{name}", default))
            for name, default in (("MIN", "0"), ("MAX", "0"), ("STEP", "1"), ("COUNT", "1"))
        )
        if count != (last - first) // step + 1:
            raise PrgkitError(
                f"the Slurm array has gaps: {count} tasks from {first} to {last}",
                where="--shard auto",
                fix="name the shard: --shard $SLURM_ARRAY_TASK_ID/N, where N is the size of the first array",
            )
        shard, found = Shard((int(environment["SLURM_ARRAY_TASK_ID"]) - first) // step, count), True
    for rank, size in (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS")):
        if rank in environment and size in environment:
            each = int(environment[size])
            return Shard(shard.number * each + int(environment[rank]), shard.total * each)
    if not found:
        raise PrgkitError(
            "nothing says which shard this process is",
            where="--shard auto",
            fix="start it as a Slurm array or with torchrun, or name the shard: --shard 0/8",
        )
    return shard
