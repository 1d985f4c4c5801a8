"""Images that a library hands out: torchvision's datasets, the Hugging Face hub, and the embedded digits."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Container, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image

from prgkit.config.prompts import load_classes
from prgkit.data.decode import UnreadableImage
from prgkit.data.files import Source, read_span
from prgkit.demo.digits import load_digits
from prgkit.errors import ImagesError, first_line, nearest
from prgkit.storage.atomic import cache_folder

LOCAL_COPY = "check the network, or put the images into a folder and give its path instead"
GONE = ("StanfordCars", "SUN397")  # from where torchvision would download them; it reads the files that are there
# torchvision's datasets whose class names are folders ("SeaLake"), none, or differ from what is usually written.
READABLE = {"Caltech101": "caltech101", "EuroSAT": "eurosat", "Flowers102": "flowers102"}


def open_torchvision(rest: str) -> Source:
    """Open ``NAME/split`` of torchvision.datasets, downloading it where the class can.

    ``NAME/train+val`` joins two splits; ``NAME`` alone is all of a dataset that has none.

    Raises:
        ImagesError: torchvision is missing, has no such dataset or split, or the download failed.
    """
    name, _, splits = rest.partition("/")
    spec = f"torchvision:{rest}"
    try:
        from torchvision import datasets
    except ImportError as error:
        fix = "pip install 'prgkit[distill]', or give a folder of images"
        raise ImagesError(f"{spec} needs torchvision, which is not installed", fix=fix) from error
    if name not in datasets.__all__:
        raise ImagesError(
            f"torchvision has no dataset {name!r}{nearest(name, datasets.__all__)}",
            fix="see https://docs.pytorch.org/vision/stable/datasets.html",
        )
    parts = [open_split(getattr(datasets, name), name, split) for split in splits.split("+")]
    return parts[0] if len(parts) == 1 else JoinedSource(parts)


def open_split(make: Any, name: str, split: str) -> DatasetSource:
    """Open one split of the dataset that ``make`` builds."""
    accepted = inspect.signature(make).parameters
    root = Path(os.path.expanduser(os.environ.get("PRGKIT_DATA_ROOT") or cache_folder("data")))
    options: dict[str, Any] = {"root": root, **split_options(name, split, accepted)}
    if "download" in accepted:
        options["download"] = name not in GONE
    title = f"{name}/{split}" if split else name
    try:
        root.mkdir(parents=True, exist_ok=True)
        with redirect_stdout(sys.stderr):  # stdout belongs to the result
            dataset = make(**options)
    except Exception as error:  # whatever the network, the disk or torchvision has to say
        what = f"torchvision:{title} could not be opened: {first_line(error)[:200]}"
        fix = f"pip install {error.name}" if isinstance(error, ImportError) else LOCAL_COPY
        raise ImagesError(what, where=root, fix=fix) from error
    return DatasetSource(title, dataset, class_names_of(name, dataset))


def split_options(name: str, split: str, accepted: Container[str]) -> dict[str, Any]:
    """Return the arguments that choose a split, of those that a dataset's class accepts."""
    if "train" not in accepted and "split" not in accepted:
        if "download" not in accepted:  # a reader of folders, no dataset
            raise ImagesError(f"torchvision's {name} has no splits", fix="give its folder of images instead")
        if split:
            raise ImagesError(f"torchvision's {name} has no splits", fix=f"write torchvision:{name}, all of it")
        return {}
    if not split:
        fix = f"write torchvision:{name}/train or torchvision:{name}/test"
        raise ImagesError(f"torchvision:{name} names no split", fix=fix)
    if "train" not in accepted:
        return {"split": split}
    if split not in ("train", "test"):
        raise ImagesError(f"{name} has no split {split!r}{nearest(split, ('train', 'test'))}", fix="use train or test")
    return {"train": split == "train"}


class DatasetSource:
    """A dataset of (picture, label) pairs, such as torchvision's; its labels are the class names it knows."""

    def __init__(self, title: str, dataset: Any, class_names: Sequence[str] | None) -> None:
        self.title = title
        self.dataset = dataset
        self.class_names = class_names
        self.targets = stored_labels(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Return ``NAME/split[index]``."""
        return f"{self.title}[{index}]"

    def label(self, index: int) -> str | int | None:
        """Return the class name, or its number where torchvision has no plain names."""
        label = self.targets[index] if self.targets is not None else self.dataset[index][1]
        return named(label, self.class_names)

    def fetch(self, index: int) -> Image.Image:
        """Return the picture."""
        return picture_of(lambda: self.dataset[index][0], self.name(index))


class JoinedSource:
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Source]) -> None:
        self.places = [(part, index) for part in parts for index in range(len(part))]

    def __len__(self) -> int:
        return len(self.places)

    def name(self, index: int) -> str:
        """Return the name that the image has in its own source."""
        part, place = self.places[index]
        return part.name(place)

    def label(self, index: int) -> str | int | None:
        """Return what its own source says the image shows."""
        part, place = self.places[index]
        return part.label(place)

    def fetch(self, index: int) -> bytes | Image.Image:
        """Return the image as its own source has it."""
        part, place = self.places[index]
        return part.fetch(place)


def class_names_of(name: str, dataset: Any) -> Sequence[str] | None:
    """Return the names of a torchvision dataset's classes in label order: ours where it has none that can be read."""
    theirs = plain_class_names(getattr(dataset, "classes", None))
    ours = load_classes(READABLE[name]) if name in READABLE else ()
    return ours if ours and len(theirs or ours) == len(ours) else theirs


def stored_labels(dataset: Any) -> Sequence[Any] | None:
    """Return the labels [images] where a dataset keeps them apart from the pictures, under one of several names."""
    stored = [getattr(dataset, attribute, None) for attribute in ("targets", "labels", "_labels", "y")]
    pairs = getattr(dataset, "_samples", None) or ()
    stored.append([pair[1] for pair in pairs if isinstance(pair, tuple) and len(pair) == 2])
    return next((labels for labels in stored if labels is not None and len(labels) == len(dataset)), None)


def open_hub(rest: str) -> HubSource:
    """Open ``owner/name/split`` of the Hugging Face hub.

    Raises:
        ImagesError: the datasets library is missing, the download failed, or there is no column of images.
    """
    spec = f"hf:{rest}"
    name, _, split = rest.rpartition("/")
    if "/" not in name:
        raise ImagesError(f"{spec} names no split", fix=f"write hf:{rest}/train, say: owner, name and split")
    try:
        import datasets
    except ImportError as error:
        fix = "pip install 'prgkit[hf]', or give a folder of images"
        raise ImagesError(f"{spec} needs the datasets library, which is not installed", fix=fix) from error
    try:
        with redirect_stdout(sys.stderr):
            dataset = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises its own, the hub's and the network's errors
        raise ImagesError(f"{spec} could not be opened: {first_line(error)[:200]}", fix=LOCAL_COPY) from error
    columns = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ImagesError(f"{spec} has no column of images, only: {', '.join(dataset.features)}", fix=LOCAL_COPY)
    # Undecoded: the bytes decide what an image is, and prgkit decodes every source alike.
    encoded = dataset.cast_column(columns[0], datasets.Image(decode=False))
    labelled = [column for column, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    preferred = [column for column in ("label", "labels", "fine_label") if column in dataset.features]
    return HubSource(rest, encoded, columns[0], next(iter(preferred + labelled), None))


class HubSource:
    """A Hugging Face dataset: encoded images in one column, labels in another."""

    def __init__(self, title: str, dataset: Any, image_column: str, label_column: str | None) -> None:
        self.title = title
        self.images = dataset.select_columns([image_column]).with_format(None)
        self.column = image_column
        self.labels = dataset.with_format(None)[label_column] if label_column else None
        names = getattr(dataset.features[label_column], "names", None) if label_column else None
        self.class_names = plain_class_names(names)

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        """Return ``owner/name/split[index]``."""
        return f"{self.title}[{index}]"

    def label(self, index: int) -> str | int | None:
        """Return the class name, or what the column holds where it has none."""
        return named(self.labels[index], self.class_names) if self.labels is not None else None

    def fetch(self, index: int) -> bytes:
        """Return the encoded image."""
        item = self.images[index][self.column]
        if item is None:
            raise UnreadableImage(self.name(index), "the dataset has no image here")
        return bytes(item["bytes"]) if item["bytes"] is not None else read_span(Path(item["path"]), self.name(index))


def open_demo(rest: str) -> DatasetSource:
    """Open ``digits/train`` or ``digits/test``, which need no network.

    Raises:
        ImagesError: there is no such demo, or what it is made from is not installed.
    """
    if not rest.startswith("digits/"):
        raise ImagesError(f"there is no demo:{rest}", fix="use demo:digits/train or demo:digits/test")
    digits = load_digits(rest.removeprefix("digits/"))
    return DatasetSource(rest, [*zip(*digits, strict=True)], None)


def picture_of(read: Any, name: str) -> Image.Image:
    """Call ``read`` and hold it to its promise of a picture."""
    try:
        picture = read()
        if isinstance(picture, Image.Image):
            picture.load()  # many datasets give a file that is opened and not read yet
    except ImportError as error:
        raise ImagesError(f"reading {name} needs {error.name}", fix=f"pip install {error.name}") from error
    except Exception as error:  # a dataset's reader may raise anything
        raise UnreadableImage(name, first_line(error)[:200]) from error
    if not isinstance(picture, Image.Image):
        raise UnreadableImage(name, f"the dataset gives a {type(picture).__name__}, not a picture")
    return picture


def plain_class_names(names: Any) -> tuple[str, ...] | None:
    """Return a dataset's class names where they can stand for its labels.

    ImageNet's classes have many spellings and one order, so there the number is the better label.
    """
    if not names or not all(isinstance(name, str) for name in names):
        return None
    return None if len(names) == 1000 and names[0].lower().startswith("tench") else tuple(names)


def named(label: Any, class_names: Sequence[str] | None) -> str | int | None:
    """Turn a dataset's label into a class name, a number, or None where it is neither."""
    if isinstance(label, str):
        return label
    try:
        number = int(label)
    except (TypeError, ValueError):
        return None
    if number < 0:  # how torchvision and the hub spell "not labelled"
        return None
    return class_names[number] if class_names and number < len(class_names) else number
