"""The index of a store: records by hand, torn and damaged ones, and a table that finds every key."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest

from prgkit.config.shard import Shard
from prgkit.data.snapshot import packed
from prgkit.teacher.feature_files import Block, BlockJournal, KeyTable

KEYS = ["00" * 16, "ff" * 16, "ab" * 16]


def block(row: int, keys: list[str] = KEYS, views: int = 2) -> Block:
    return Block(row, packed(keys), tuple(bytes([view] * 16) for view in range(views)), Shard(3, 7))


def test_a_record_by_hand_and_back(tmp_path: Path) -> None:
    body = struct.pack("<QIIII", 5, 3, 2, 3, 7) + bytes.fromhex("".join(KEYS)) + bytes(16) + b"\1" * 16
    record = b"prgblk\r\n" + hashlib.blake2b(body, digest_size=16).digest() + body
    assert block(5).packed() == record
    journal = BlockJournal(tmp_path / "index.bin")
    journal.append(block(5))
    assert journal.path.read_bytes() == record
    assert list(journal.new_blocks()) == []  # it appended them itself
    (found,) = BlockJournal(journal.path).new_blocks()
    assert found.packed() == record


@pytest.mark.parametrize("cut", [1, 8, 30, 60])
def test_a_torn_record_is_left_out_and_overwritten(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "index.bin"
    path.write_bytes(block(0).packed() + block(3).packed()[:cut])
    journal = BlockJournal(path)
    assert [one.row for one in journal.new_blocks()] == [0]
    assert journal.damages == []
    journal.append(block(9))
    assert path.read_bytes() == block(0).packed() + block(9).packed()


def test_what_another_process_appends_is_seen_and_damage_is_told_once(tmp_path: Path) -> None:
    reader, writer = (BlockJournal(tmp_path / "index.bin") for _ in range(2))
    for row in (0, 3, 6):
        writer.append(block(row))
        assert [one.row for one in reader.new_blocks()] == [row]
    size = len(block(0).packed())
    content = bytearray(reader.path.read_bytes())
    content[size + 50] ^= 1
    reader.path.write_bytes(content)
    again = BlockJournal(reader.path)
    assert [one.row for one in again.new_blocks()] == [0, 6]
    assert [tuple(damage) for damage in again.damages] == [(size, 2 * size)]
    again.mend()
    last = BlockJournal(reader.path)
    assert [one.row for one in last.new_blocks()] == [0, 6]
    assert last.damages == []


def test_the_table_finds_every_key_and_no_other() -> None:
    generator = np.random.default_rng(0)
    keys = generator.integers(0, 256, (5000, 16), dtype=np.uint8)
    keys[1:40, :8] = keys[0, :8]  # the same first half
    table = KeyTable()
    for start in range(0, 5000, 700):
        part = keys[start : start + 700]
        table.add(part, np.arange(start, start + len(part)), 3)
    hexed = [key.tobytes().hex() for key in keys]
    strangers = [f"{hexed[0][:16]}{number:016x}" for number in range(3)] + ["0" * 32, "f" * 32]
    found = table.find(hexed + strangers)
    assert found.places.tolist() == [*range(5000), *[-1] * 5]
    assert found.views.tolist() == [3] * 5000 + [0] * 5
    assert table.drop(10, 20) == 10
    assert (table.find(hexed).places[8:22] == [8, 9, *[-1] * 10, 20, 21]).all()
    assert len(table) == 4990


def test_of_one_key_the_most_views_count_and_then_the_last() -> None:
    table = KeyTable()
    for place, views in ((0, 3), (10, 9), (20, 3), (30, 9), (40, 1)):
        table.add(packed([KEYS[2]]), np.array([place]), views)
        table.find(KEYS)
    table.add(packed([KEYS[0]]), np.array([7]), 1)
    assert [column.tolist() for column in table.find(KEYS)] == [[7, -1, 30], [1, 0, 9]]
    assert len(table) == 2
