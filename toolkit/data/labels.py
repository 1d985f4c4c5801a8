"""Labels of images, matched with the class names; only evaluation, and what says that it learns labels, comes here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from prgkit.config.class_names import WORDNET_ID
from prgkit.config.prompts import canonical
from prgkit.errors import ImagesError, nearest, some
from prgkit.progress import silent

NUMBER = re.compile(r"([0-9]+)(?:\.0*)?")  # a spreadsheet writes 3 as 3.0
NUMBERED = re.compile(r"(?:\d+|n\d{8})[\s._-]+(?=.*[^\W\d])(.+)")  # 001.Black_footed_Albatross, n02085620-Chihuahua
# Some of ImageNet's classes, in every wording of them, and their places in the order of its WordNet ids.
IMAGENET = {
    0: "tench", 1: "goldfish", 105: "koala", 207: "golden retriever", 340: "zebra", 388: "panda", 497: "church",
    574: "golf ball", 701: "parachute", 805: "soccer ball", 954: "banana", 999: "toilet",
}  # fmt: skip

Label = str | int  # a number as a library hands it out counts from 0; one that people wrote is text


def class_indices(
    labels: Sequence[Label | None],
    class_names: Sequence[str],
    *,
    names: Sequence[str],
    where: str,
    first_number: int | None = None,
    note: Callable[[str], None] = silent,
) -> NDArray[np.int64]:
    """Turn labels into class indices [images]; labels are class names, in any spelling, or numbers in their order.

    ``first_number`` is what the first class's number is; None: found from the numbers, and always said.

    Raises:
        ImagesError: an image has no label, a label is no class, or numbers could count from 0 as well as from 1.
    """
    unlabelled = [name for name, label in zip(names, labels, strict=True) if label is None]
    if unlabelled:
        raise ImagesError(
            f"{len(unlabelled)} of {len(labels)} images have no label: {some(unlabelled)}",
            where=where,
            fix="put the images into folders named by class, or give a CSV of file,label rows",
        )
    examples = {label: name for name, label in zip(reversed(names), reversed(labels), strict=True) if label is not None}
    found = by_name(examples, class_names)
    if in_wordnet_order(examples, class_names):
        ends = f"{min(map(str, examples))} is {class_names[0]}, {max(map(str, examples))} is {class_names[-1]}"
        note(f"labels are WordNet ids, read in their order: {ends}")
    if not found and (numbers := as_numbers(examples)) is not None:
        written = any(isinstance(label, str) for label in examples)
        first = counted_from(numbers, examples, class_names, first_number, where=where) if written else 0
        found = {label: number - first for label, number in numbers.items() if 0 <= number - first < len(class_names)}
        if len(found) == len(examples):
            note(numbers_told({numbers[label] for label in found}, first, class_names))
    else:
        found |= {label: label for label in examples if isinstance(label, int) and 0 <= label < len(class_names)}
    strangers = sorted((label for label in examples if label not in found), key=str)
    if strangers:
        hints = [f"{label!r}{hint(label, class_names)}" for label in strangers[:3]]
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        last = (first_number or 0) + len(class_names) - 1
        fix = f"label with the class names, or with numbers from {first_number or 0} to {last} in their order"
        if len(class_names) == 1000 and all(WORDNET_ID.fullmatch(str(label)) for label in strangers):
            fix = "name the classes as ImageNet does, in the order of its ids (data.classes: imagenet1k), or " + fix
        raise ImagesError(
            f"{len(strangers)} of {len(examples)} labels match no class: {', '.join(hints)}{more}",
            where=where,
            fix=fix,
        )
    return np.array([found[label] for label in labels if label is not None], dtype=np.int64)


def lookup(labels: Iterable[Label], class_names: Sequence[str]) -> dict[Label, int]:
    """Find each label's class index, numbers counted from 0; a label without one is left out.

    Text is a name before it is a number: digits as text are indices only where none of the labels is a name.
    """
    distinct = set(labels)
    found = by_name(distinct, class_names)
    numbers = as_numbers(label for label in distinct if not found or isinstance(label, int)) or {}
    return found | {label: number for label, number in numbers.items() if number < len(class_names)}


def by_name(labels: Iterable[Label], class_names: Sequence[str]) -> dict[Label, int]:
    """Return the class index of each label that is a class's name: as it is, in another spelling, or after a number."""
    texts = [label for label in labels if isinstance(label, str)]
    if in_wordnet_order(texts, class_names):
        return {text: index for index, text in enumerate(sorted(texts))}  # ImageNet's folders: its order is theirs
    exact = {name: index for index, name in enumerate(class_names)}
    loose = {canonical(name): index for index, name in enumerate(class_names)}

    def find(text: str) -> int | None:
        whole = NUMBER.fullmatch(text)
        spellings = (text, text.replace("/", " "), whole[1] if whole else text)  # SUN397 writes "apse/indoor"
        return exact.get(text, next((loose[key] for one in spellings if (key := canonical(one)) in loose), None))

    found: dict[Label, int] = {text: index for text in texts if (index := find(text)) is not None}
    # A number in front is only passed over where it could not be what tells two labels apart.
    bare = {text: index for text in texts if text not in found and (index := find(unnumbered(text))) is not None}
    named = Counter([*found.values(), *bare.values()])
    return found | {text: index for text, index in bare.items() if named[index] == 1}


def in_wordnet_order(labels: Collection[Label], class_names: Sequence[str]) -> bool:
    """Tell whether labels are the ids of ImageNet's 1,000 classes, and the classes those, in the order of the ids."""
    return (
        len(class_names) == len(labels) == 1000
        and all(WORDNET_ID.fullmatch(str(label)) for label in labels)
        and all(name in canonical(class_names[index]) for index, name in IMAGENET.items())
    )


def unnumbered(text: str) -> str:
    """Return a label without the number or WordNet id in front of it, if any."""
    match = NUMBERED.fullmatch(text)
    return match[1] if match else text


def as_numbers(labels: Iterable[Label]) -> dict[Label, int] | None:
    """Return what number each label is, or None where one of them is none."""
    matches = {label: NUMBER.fullmatch(str(label)) for label in labels}
    sizes = {label: int(match[1]) for label, match in matches.items() if match and len(match[1]) < 10}
    return sizes if len(sizes) == len(matches) else None


def counted_from(
    numbers: dict[Label, int],
    examples: dict[Label, str],
    class_names: Sequence[str],
    first_number: int | None,
    *,
    where: str,
) -> int:
    """Return whether numbers that people wrote count from 0 or from 1, or refuse where it cannot be known."""
    used = set(numbers.values())
    first = first_number if first_number is not None else first_of(used, len(class_names))
    if first is not None or max(used) > len(class_names):
        return first or 0
    shown = [(label, number) for label, number in sorted(numbers.items(), key=lambda pair: pair[1])][:3]
    ways = "".join(
        f"\n    from {first}: "
        + ", ".join(f"{label} is {class_names[number - first]} ({examples[label]})" for label, number in shown)
        for first in (0, 1)
    )
    raise ImagesError(
        f"the labels are numbers from {min(used)} to {max(used)}, and could count from 0 as well as from 1:{ways}",
        where=where,
        fix="say which: --set data.label_format.first_number=0, or 1; or label with the class names",
    )


def first_of(used: Collection[int], count: int) -> int | None:
    """Return what numbers of ``count`` classes count from, 0 or 1, or None where they do not say it."""
    return 0 if 0 in used else 1 if count in used and max(used) == count else None


def numbers_told(used: Collection[int], first: int, class_names: Sequence[str]) -> str:
    """Say what the numbers were read as."""
    pairs = [f"{number} is {name}" for number, name in enumerate(class_names, first)]
    shown = pairs if len(pairs) <= 4 else [*pairs[:2], "...", pairs[-1]]
    missing = [str(number) for number in range(first, first + len(class_names)) if number not in used]
    none = f"; no image has {some(missing)}" if missing else ""
    return f"labels are numbers, read from {first}: {', '.join(shown)}{none}"


def hint(label: Label, class_names: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)`` where a class name is close."""
    close = nearest(label, class_names).removeprefix("; ") if isinstance(label, str) else ""
    return f" ({close})" if close else ""
