"""Class names and the sentences they are put into before the teacher reads them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from importlib import resources
from pathlib import Path

from prgkit.config.class_names import like_ids, odd_names, read_names
from prgkit.errors import RecipeError, nearest, some
from prgkit.progress import silent
from prgkit.storage.atomic import as_on_disk, composed, read_text

LISTS = Path(str(resources.files("prgkit.recipes"))) / "classes"  # one name a line, in label order
LEARNED = ("{context} {}.",)  # how a learned context is told; no teacher reads these words
# One a line: OpenAI's for each dataset (CLIP, data/prompts.md), and as "photo" the seven that their forward search over
# the 80 for ImageNet kept (CLIP, "Prompt Engineering for ImageNet").
TEMPLATES = LISTS.with_name("templates")

NAMED_CLASSES = tuple(sorted((*(path.stem for path in LISTS.glob("*.txt")), "digits", "imagenet1k")))
LIST_SUFFIXES = (".txt", ".names", ".list", ".csv", ".json")
NAMES_FIX = f"give a text file with one name a line, or one of {', '.join(NAMED_CLASSES)}"
NAMED_TEMPLATES = tuple(sorted((*(path.stem for path in TEMPLATES.glob("*.txt")), "digits", "imagenet")))


def load_classes(
    value: str | Sequence[str],
    *,
    note: Callable[[str], None] = silent,
    where: str = "the class names",
    fewest: int = 2,
) -> tuple[str, ...]:
    """Return class names: a named list, a file of names, or the names given.

    ``note`` is told what a file has besides names, which is left out, and which names look like ids.

    Raises:
        RecipeError: there is no such list or file, or its names are empty, repeated or fewer than ``fewest``.
    """
    if not isinstance(value, str):
        entries = [(f"entry {number}", name) for number, name in enumerate(value, 1)]
        names = checked_classes(entries, where=where, fewest=fewest)
    elif value in NAMED_CLASSES:
        return named_classes(value)
    else:
        path = find_file(value)
        names = listed_classes(path, silent if path.parent == LISTS else note, fewest=fewest)
    if odd := like_ids(names):
        note(f"class names look like ids: {some(odd)}; the teacher reads them as words")
    elif odd := odd_names(names):
        note(f"class names look odd: {some(odd)}; the teacher reads them as they are")
    return names


def load_words(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return data.words, given as class names are; one is enough.

    Raises:
        RecipeError: as `load_classes` does, or one of them is more than a contrast pair.
    """
    words = load_classes(value, where="data.words", fewest=1)
    if wrong := [word for word in words if len(phrases(word)) > 2]:
        fix = "write two phrases, as in 'old / new'"
        raise RecipeError(f"{wrong[0]!r} is no contrast pair", where="data.words", fix=fix)
    return words


def phrases(word: str) -> list[str]:
    """Return what one of data.words says: a phrase, or the two of a contrast pair, "striped / plain"."""
    return [phrase.strip() for phrase in word.split(" / ")]


def load_templates(value: str | Sequence[str]) -> tuple[str, ...]:
    """Return prompt templates: a named set, or the templates given; each has one ``{}`` for the class name.

    Raises:
        RecipeError: there is no such set, or a template has no place, or several, for the class name.
    """
    if isinstance(value, str) and not set(value) & set(" {}"):
        if value not in NAMED_TEMPLATES:
            raise RecipeError(
                f"there is no template set {value!r}{nearest(value, NAMED_TEMPLATES)}",
                fix=f"use one of {', '.join(NAMED_TEMPLATES)}, or write templates such as 'a photo of a {{}}.'",
            )
        return named_templates(value)
    templates = (value,) if isinstance(value, str) else tuple(value)
    if not templates:
        raise RecipeError("there are no prompt templates", fix="name a set, or write one such as 'a photo of a {}.'")
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            fix = "write {} once, where the class name belongs, as in 'a photo of a {}.'"
            raise RecipeError(f"the template {template!r} has not exactly one {{}}", fix=fix)
    return templates


def fill(templates: Sequence[str], classes: Sequence[str]) -> list[list[str]]:
    """Return the prompts [templates][classes]; underscores in class names become spaces."""
    return [[template.replace("{}", name.replace("_", " ")) for name in classes] for template in templates]


def canonical(name: str) -> str:
    """Return the form in which two spellings of a class are one: CLIP's tokenizer sees neither case nor spacing.

    Accents are composed (NFC); what has no shape, as a mark of direction or a soft hyphen, is left out.
    """
    shown = "".join(letter for letter in name.replace("_", " ") if unicodedata.category(letter) != "Cf")
    return composed(" ".join(shown.split()).casefold())


def named_classes(name: str) -> tuple[str, ...]:
    """Return one of NAMED_CLASSES in label order."""
    if name == "imagenet1k":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        # OpenAI's list gives two classes each the same name, and a teacher cannot tell the same sentence apart.
        # Their WordNet names can: 744 is a projectile, 836 a sunglass (a burning lens).
        renamed = {744: "projectile", 836: "sunglass"}
        return tuple(renamed.get(index, given) for index, given in enumerate(IMAGENET_CLASSNAMES))
    if name == "digits":
        from prgkit.demo.digits import CLASSES

        return CLASSES
    return listed_classes(LISTS / f"{name}.txt")


def listed_classes(path: Path, note: Callable[[str], None] = silent, *, fewest: int = 2) -> tuple[str, ...]:
    """Return the names in a file, in any of the forms that other tools write; ``note`` is told what was taken off."""
    try:
        text = read_text(path)
    except ValueError as error:
        what = f"{path.name} cannot be read: {error}"
        raise RecipeError(what, where=path, fix="save it as a UTF-8 text file") from error
    entries, remarks = read_names(text, path)
    names = checked_classes(entries, where=path, fewest=fewest)
    for remark in remarks:
        note(remark)
    return names


def named_templates(name: str) -> tuple[str, ...]:
    """Return one of NAMED_TEMPLATES."""
    if name == "imagenet":
        from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

        return tuple(template("{}") for template in OPENAI_IMAGENET_TEMPLATES)
    if name == "digits":
        from prgkit.demo import digits

        return digits.TEMPLATES
    return tuple(read_text(TEMPLATES / f"{name}.txt").splitlines())


def checked_classes(names: Iterable[tuple[str, object]], *, where: object, fewest: int) -> tuple[str, ...]:
    """Return the names, given with their places, or say what is wrong with them."""
    first_at: dict[str, str] = {}
    repeated: list[str] = []
    accepted: list[str] = []
    for at, name in names:
        if not isinstance(name, str):
            raise RecipeError(f"class name {name!r} is not text ({at})", where=where, fix="put quotes around it")
        if not canonical(name):
            raise RecipeError(f"a class name is empty ({at})", where=where, fix="remove it, or write the name")
        earlier = first_at.setdefault(canonical(name), at)
        if earlier != at:
            repeated.append(f"{name.strip()!r} ({earlier} and {at})")
        if any(unicodedata.category(letter) == "Cc" for letter in " ".join(name.split())):
            raise RecipeError(f"class name {name!r} has a control character ({at})", where=where, fix="remove it")
        accepted.append(composed(" ".join(name.split())))
    if repeated:
        more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        what = f"class names repeat: {', '.join(repeated[:5])}{more}"
        raise RecipeError(what, where=where, fix="keep one of each; case, spaces and underscores make no difference")
    if len(accepted) < fewest:
        what = f"there is only one class, {accepted[0]!r}" if accepted else "there are no class names"
        fix = "give at least two, or there is nothing to tell apart" if fewest > 1 else "give one, or leave them out"
        raise RecipeError(what, where=where, fix=fix)
    return tuple(accepted)


def find_file(value: str) -> Path:
    """Return the class file of that path."""
    expanded = os.path.expandvars(os.path.expanduser(value))
    given = Path(expanded)
    try:
        file = as_on_disk(given)
        if expanded and file.exists():
            return require_list(file)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise RecipeError(f"there is no class list {value[:80]!r}: {error.strerror}", fix=NAMES_FIX) from error
    parent = given.parent
    siblings = [path.name for path in parent.iterdir() if path.is_file()] if parent.is_dir() else []
    raise RecipeError(
        f"there is no class list {value!r}{nearest(given.name, [*NAMED_CLASSES, *siblings])}",
        where=parent.absolute(),
        fix=NAMES_FIX,
    )


def require_list(path: Path) -> Path:
    """Return a file that is a list of names by its own name.

    A recipe may point anywhere, ``../photos`` and ``../names.txt`` too: it is its user's. But of all that it points at,
    this file alone is copied, line for line, into every run and from there into every bundle that is given away. So a
    page by a stranger that says ``/etc/passwd`` or ``~/.ssh/id_rsa`` here is refused before anything is read or shown.
    """
    if path.suffix.lower() not in LIST_SUFFIXES:
        what = f"{path.name} is not a class list by its name: its lines would travel in every bundle"
        raise RecipeError(what, where=path, fix=f"give a text file that ends in {', '.join(LIST_SUFFIXES)}")
    return path
