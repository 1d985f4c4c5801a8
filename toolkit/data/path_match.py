"""Which image a path in a table means: people write whole paths, of other machines too, base names, and bare ids."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from prgkit.data.sources import printable

SPLITS = {"train": 0, "training": 0, "test": 1, "testing": 1, "val": 2, "valid": 2, "validation": 2, "dev": 3}
UPLOADED = re.compile(r"(^|[/\\])(?!(?:19|20)\d{6})[0-9a-f]{8}-(?=[^/\\]+$)")  # Label Studio's, and not a date
Index = dict[str, list[int]]


class Match(NamedTuple):
    """The images that a path could mean; more than one where it does not say."""

    images: list[int]
    depth: int  # how many parts of the path agree, from its end
    whole: bool  # all of them
    elsewhere: bool  # it names a folder, and it is not the folder that the images lie in
    spelled: bool  # with its suffix


class Paths:
    """The paths of a source's images; one in a table means an image if it is the end of its path, or it its end.

    So a base name does, a path from above the source, and one on another machine; a suffix may be missing, separators
    may be Windows', and small letters stand for capitals where nothing else fits.
    """

    def __init__(self, spec: str, names: Sequence[str]) -> None:
        root = printable(os.path.abspath(os.path.expandvars(os.path.expanduser(spec)))).replace(os.sep, "/")
        above, suffix = os.path.splitext(root)
        self.names = names
        inside = [name.partition(".tar/") for name in names]  # shard, ".tar/", member
        self._own = ["/".join(parts(member or shard)) for shard, _, member in inside]
        self._shards = [f"{shard}.tar" if member else "" for shard, _, member in inside]
        self._root = parts(os.path.dirname(root) if suffix == ".tar" else above if suffix == ".zip" else root)
        last = {path.rpartition("/")[2].casefold() for path in self._own}
        self._last = last | {os.path.splitext(name)[0] for name in last}  # tells at once what none of them can be
        self._wholes: dict[tuple[bool, bool], Index] = {}
        self._ends: dict[tuple[int, bool, bool], Index] = {}
        self._found: dict[str, Match | None] = {}

    def find(self, text: str) -> Match | None:
        """Return what a path means here, if anything."""
        if text not in self._found:
            self._found[text] = self._search(printable(text))
        return self._found[text]

    def _search(self, text: str) -> Match | None:
        both = dict.fromkeys((text, text.replace("\\", "/")))
        spellings = [one for one in both if one.rpartition("/")[2].casefold() in self._last]
        for fold in (False, True):
            for bare in (False, True):
                for spelling in spellings:
                    if match := self._match(parts(spelling.casefold() if fold else spelling), fold, bare):
                        return match
        inner = UPLOADED.sub(r"\1", text)
        match = self._search(inner) if inner != text else None
        return match if match and len(match.images) == 1 else None

    def _match(self, path: list[str], fold: bool, bare: bool) -> Match | None:
        count, wholes = len(path), self._whole(fold, bare)
        if not path:
            return None
        if same := wholes.get("/".join(path)):
            return Match(same, count, True, False, not bare)
        found = [(count, index) for index in self._ending(count, fold, bare).get("/".join(path), [])]
        for depth in range(1, count):
            for index in wholes.get("/".join(path[-depth:]), []):
                if (above := self._agreeing(path[:-depth], index, fold)) is not None:
                    found.append((depth + above, index))
        if not found:
            return None
        most = max(agreeing for agreeing, _ in found)
        images = [index for agreeing, index in found if agreeing == most]
        own = self._own[images[0]].count("/") + 1
        return Match(images, most, most == count, own <= most < count and most == own, not bare)

    def _agreeing(self, above: list[str], index: int, fold: bool) -> int | None:
        """Count the folders above an image that agree, from its side; None where one is train and the other test."""
        folders = [*self._root, *filter(None, [self._shards[index]])]
        if fold:
            folders = [folder.casefold() for folder in folders]
        count = 0
        for theirs, ours in zip(reversed(above), reversed(folders), strict=False):
            if theirs != ours:
                splits = SPLITS.get(theirs.casefold()), SPLITS.get(ours.casefold())
                return None if None not in splits and splits[0] != splits[1] else count
            count += 1
        return count

    def _whole(self, fold: bool, bare: bool) -> Index:
        """Return the images by their whole path below the source."""
        if (fold, bare) not in self._wholes:
            self._wholes[fold, bare] = indexed(enumerate(spelled(path, fold, bare) for path in self._own))
        return self._wholes[fold, bare]

    def _ending(self, count: int, fold: bool, bare: bool) -> Index:
        """Return the images that lie deeper by the last ``count`` parts of their path."""
        if (count, fold, bare) not in self._ends:
            deeper = ((index, path) for index, path in enumerate(self._own) if path.count("/") >= count)
            ends = ((index, "/".join(spelled(path, fold, bare).split("/")[-count:])) for index, path in deeper)
            self._ends[count, fold, bare] = indexed(ends)
        return self._ends[count, fold, bare]


def parts(path: str) -> list[str]:
    """Split a path at its slashes, without what leads nowhere and without steps up at its start."""
    found = [part for part in path.split("/") if part not in ("", ".")]
    while found and found[0] == "..":
        del found[0]
    return found


def spelled(path: str, fold: bool, bare: bool) -> str:
    """Return a path without its suffix, in small letters, or as it is."""
    path = os.path.splitext(path)[0] if bare else path
    return path.casefold() if fold else path


def indexed(pairs: Iterable[tuple[int, str]]) -> Index:
    """Collect the numbers of each text."""
    found: Index = {}
    for index, text in pairs:
        found.setdefault(text, []).append(index)
    return found
