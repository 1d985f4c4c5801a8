"""JSON files with a schema: what is read back, and what a file that cannot be is said to be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from prgkit.errors import PrgkitError, RunError
from prgkit.storage.atomic import write_sealed
from prgkit.storage.documents import read_document


class Card(BaseModel, extra="forbid"):
    schema_version: Literal["prgkit.card/2"] = Field("prgkit.card/2", alias="schema")
    width: int


class Plain(BaseModel, extra="forbid"):
    width: int


@pytest.mark.parametrize("model", [Card, Plain])
def test_a_document_is_read_back(tmp_path: Path, model: type[Card | Plain]) -> None:
    write_sealed(tmp_path / "card.json", {"schema": "prgkit.card/2", "width": 8})
    assert read_document(tmp_path / "card.json", model, "prgkit.card/2", what="a card", fix="mend it").width == 8


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "there is no card.json"),
        ("{", "card.json is damaged: Expecting"),
        ([], "card.json is not a card"),
        ({"width": 8}, "card.json is not a card"),
        ({"schema": "prgkit.run/2", "width": 8}, "card.json is not a card"),
        ({"schema": "prgkit.card/1", "width": 8}, "card.json has schema 'prgkit.card/1', not 'prgkit.card/2'"),
        ({"schema": "prgkit.card/2"}, "card.json is damaged: width: Field required"),
    ],
)
def test_what_is_no_such_document_is_refused_by_what_is_wrong(tmp_path: Path, content: object, told: str) -> None:
    path = tmp_path / "card.json"
    if content is not None:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(RunError) as caught:
        read_document(path, Card, "prgkit.card/2", what="a card", fix="mend it", error=RunError, sealed=False)
    assert (caught.value.what[: len(told)], caught.value.fix) == (told, "mend it")


def test_a_sealed_document_needs_its_digest(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text('{"schema": "prgkit.card/2", "width": 8}')
    with pytest.raises(PrgkitError, match="its content is not what was written"):
        read_document(tmp_path / "card.json", Card, "prgkit.card/2", what="a card", fix="mend it")
