"""Class names and the sentences they are put into before the teacher reads them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from prgkit.errors import RecipeError, nearest
from prgkit.files import read_text

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster
    man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck
    pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone television tiger
    tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""  # in label order; an underscore stands for the space inside a name

PLAIN = ("a photo of a {}.",)
# The seven that OpenAI's forward search over its 80 ImageNet templates kept (CLIP, "Prompt Engineering for ImageNet").
PHOTO = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
# OpenAI's 18 for CIFAR-10 and CIFAR-100 (CLIP, data/prompts.md): nine looks and sizes, each with "a" and with "the".
LOOKS = ("", "blurry ", "black and white ", "low contrast ", "high contrast ", "bad ", "good ")
CIFAR = tuple(
    f"a {look}photo of {article} {size}{{}}."
    for article in ("a", "the")
    for look, size in (*((look, "") for look in LOOKS), ("", "small "), ("", "big "))
)

NAMED_CLASSES = ("cifar10", "cifar100", "digits", "imagenet1k")
LIST_SUFFIXES = (".txt", ".names", ".list", ".csv")
NAMES_FIX = f"give a text file with one name a line, or one of {', '.join(NAMED_CLASSES)}"
NAMED_TEMPLATES = ("cifar", "digits", "imagenet", "photo", "plain")


def load_classes(value: str | Sequence[str], *, folder: Path | None = None) -> tuple[str, ...]:
    """Return class names: a named list, a text file with one name a line (relative to ``folder``), or the names given.

    Raises:
        RecipeError: there is no such list or file, or its names are empty, repeated or fewer than two.
    """
    if not isinstance(value, str):
        entries = [(f"entry {number}", name) for number, name in enumerate(value, 1)]
        return checked_classes(entries, where="the class names")
    if value in NAMED_CLASSES:
        return named_classes(value)
    path = find_file(value, folder)
    lines = enumerate(read_lines(path), 1)
    names = [(f"line {number}", line.strip()) for number, line in lines]
    return checked_classes([(at, name) for at, name in names if name and not name.startswith("#")], where=path)


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
    """Return the form in which two spellings of a class are one: CLIP's tokenizer sees neither case nor spacing."""
    return " ".join(name.replace("_", " ").split()).casefold()


def named_classes(name: str) -> tuple[str, ...]:
    """Return one of NAMED_CLASSES in label order."""
    if name == "imagenet1k":
        from prgkit.teacher import imagenet_classes

        # OpenAI's list gives two classes each the same name, and a teacher cannot tell the same sentence apart.
        # Their WordNet names can: 744 is a projectile, 836 a sunglass (a burning lens).
        renamed = {744: "projectile", 836: "sunglass"}
        return tuple(renamed.get(index, given) for index, given in enumerate(imagenet_classes()))
    if name == "digits":
        from prgkit.demo.digits import CLASSES

        return CLASSES
    words = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    return tuple(word.replace("_", " ") for word in words.split())


def named_templates(name: str) -> tuple[str, ...]:
    """Return one of NAMED_TEMPLATES."""
    if name == "imagenet":
        from prgkit.teacher import imagenet_templates

        return tuple(imagenet_templates())
    if name == "digits":
        from prgkit.demo.digits import TEMPLATES

        return TEMPLATES
    return {"cifar": CIFAR, "photo": PHOTO, "plain": PLAIN}[name]


def checked_classes(names: Iterable[tuple[str, object]], *, where: object) -> tuple[str, ...]:
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
        accepted.append(name.strip())
    if repeated:
        more = f" and {len(repeated) - 5} more" if len(repeated) > 5 else ""
        what = f"class names repeat: {', '.join(repeated[:5])}{more}"
        raise RecipeError(what, where=where, fix="keep one of each; case, spaces and underscores make no difference")
    if len(accepted) < 2:
        what = f"there is only one class, {accepted[0]!r}" if accepted else "there are no class names"
        raise RecipeError(what, where=where, fix="give at least two, or there is nothing to tell apart")
    return tuple(accepted)


def find_file(value: str, folder: Path | None) -> Path:
    """Return the class file: relative to ``folder`` first, then to where the command runs."""
    given = Path(os.path.expandvars(os.path.expanduser(value)))
    candidates = [folder / given, given] if folder else [given]
    try:
        found = next((path for path in candidates if path.exists()), None)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise RecipeError(f"there is no class list {value[:80]!r}: {error.strerror}", fix=NAMES_FIX) from error
    if found is not None:
        return require_list(found)
    parent = candidates[0].parent
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


def read_lines(path: Path) -> list[str]:
    """Read a UTF-8 text file, with or without a byte order mark."""
    try:
        return read_text(path).splitlines()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        what = f"{path.name} cannot be read: {reason}"
        raise RecipeError(what, where=path, fix="save it as a UTF-8 text file") from error
