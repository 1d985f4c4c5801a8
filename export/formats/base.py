"""What an export format is: which options ask for it, how it is made, and how its files are run without prgkit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prgkit.export.bundle.manifest import Artifact, Manifest, NotKept
from prgkit.export.formats.options import ExportOptions

if TYPE_CHECKING:
    from prgkit.export.formats.student_export import StudentExport


class Made(NamedTuple):
    """What came of a format."""

    artifacts: Sequence[Artifact] = ()
    not_kept: Sequence[NotKept] = ()
    decided: frozenset[str] = frozenset()  # artifacts, by name, that an older bundle's do not stand in for any more


class Format(Protocol):
    """One kind of file that a student leaves in: a frozen object, listed in `FORMATS`."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def extra(self) -> str | None:
        """What ``pip install 'prgkit[...]'`` must name to make it; None where the base install can."""
        ...

    @property
    def preprocessing_inside(self) -> bool:
        """Whether its files take pixels; else they take what the manifest says of their input."""
        ...

    def wanted(self, options: ExportOptions) -> bool:
        """Tell whether these options ask for it."""
        ...

    def require(self, options: ExportOptions) -> None:
        """Refuse before any work is done what cannot be made here, or not with these options.

        Raises:
            PrgkitError: says what is missing.
        """
        ...

    def make(self, export: StudentExport) -> Made:
        """Make its files of the student, or of the artifacts that the export has made so far."""
        ...

    def how_to_run(self, manifest: Manifest) -> str:
        """Return the bundle's README on how its files are run without prgkit; nothing where there is none to say."""
        ...
