"""What an export format is: which options ask for it, how it is made, and how its files are run without prgkit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from prgkit.export.bundle.manifest import Artifact, Manifest, NotKept
from prgkit.export.formats.options import ExportOptions

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport


class Made(NamedTuple):
    """What came of a format."""

    artifacts: Sequence[Artifact] = ()
    not_kept: Sequence[NotKept] = ()
    decided: frozenset[str] = frozenset()  # artifacts, by name, that an older bundle's do not stand in for any more


@dataclass(frozen=True)
class Format:
    """One kind of file that a student leaves in, listed in `FORMATS`."""

    name: str
    wanted: Callable[[ExportOptions], bool]  # whether these options ask for it
    # Makes its files of the student, or of the artifacts that the export has made so far.
    make: Callable[[StudentExport], Made]
    # Refuses, before any work is done, what cannot be made here or not with these options: raises a PrgkitError.
    require: Callable[[ExportOptions], None] = lambda options: None
    # The bundle's README on how its files are run without prgkit; nothing where it is as with the FP32 ONNX file.
    how_to_run: Callable[[Manifest], str] = lambda manifest: ""
    # The options that ask for it, as the command line has them, where its name in ``formats`` does not.
    asked_by: str | None = None
