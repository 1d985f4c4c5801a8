"""JSON files that hold a pydantic model and say of which schema they are: read whole, or refused by what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from prgkit.config.messages import first_mistake
from prgkit.errors import PrgkitError
from prgkit.storage.atomic import read_json, read_sealed

Document = TypeVar("Document", bound=BaseModel)


def read_document(
    path: Path,
    model: type[Document],
    schema: str,
    *,
    what: str,
    fix: str,
    error: type[PrgkitError] = PrgkitError,
    sealed: bool = True,
) -> Document:
    """Read a file that holds a ``model`` beside the name of its ``schema``, and by ``sealed`` a digest of itself.

    ``what`` says what it should be, for one that is something else.

    Raises:
        PrgkitError: of the kind ``error``; the file is missing, damaged, of another version, or something else.
    """
    try:
        content = read_sealed(path, fix=fix) if sealed else read_json(path, fix=fix)
    except PrgkitError as damage:
        raise error(damage.what, where=damage.where, fix=fix) from damage
    found = content.get("schema") if isinstance(content, dict) else None
    if found != schema:
        is_other_version = str(found).partition("/")[0] == schema.partition("/")[0]
        problem = f"has schema {found!r}, not {schema!r}" if is_other_version else f"is not {what}"
        raise error(f"{path.name} {problem}", where=path, fix=fix)
    if "schema_version" not in model.model_fields:
        del content["schema"]
    try:
        return model.model_validate(content)
    except ValidationError as mistakes:
        raise error(f"{path.name} is damaged: {first_mistake(mistakes)}", where=path, fix=fix) from mistakes
