"""Every shipped recipe is rehearsed whole, with a few pictures, the demo's teacher and a small student standing in."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch", reason="a rehearsal times the teacher and the student")

from prgkit.cli.main import main
from prgkit.config.prompts import load_classes
from prgkit.config.recipe import load_recipe, shipped_recipes
from prgkit.data.hub import split_options
from prgkit.data.labels import class_indices
from prgkit.data.sources import open_images

# Quick on a CPU; the demo rehearses with a student of the family that most of the others have.
STAND_IN = "test_efficientnet"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures, in folders named by two classes that every recipe below is given."""
    generator = np.random.default_rng(0)
    for number in range(12):
        folder = tmp_path / "pictures" / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "pictures"


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_rehearses(
    name: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prgkit.training.dry_run.PROBE_SECONDS", 0.0)
    monkeypatch.setattr("prgkit.training.distributed.PROBE_STEPS", 1)
    page = load_recipe(name, overrides=["data.classes=[cat, dog]"])
    stand_in = page.student.model if name == "demo" else STAND_IN
    overrides = {
        "data.classes": "[cat, dog]",
        "data.evaluation": str(pictures),
        "teacher": "{model: 'demo:digits', batch_size: 4}",
        "student.model": stand_in,
        "student.image_size": "32",
        "student.initial": "random",
    }
    sets = [word for key, value in overrides.items() for word in ("--set", f"{key}={value}")]
    monkeypatch.setattr(
        sys, "argv", ["prgkit", "distill", name, "--images", str(pictures), *sets, "--dry-run", "--json"]
    )
    main()
    told = json.loads(capsys.readouterr().out)["distill"]
    views = 1 + page.views.count
    assert told["run"] == f"runs/{name}"
    assert (told["images"], told["images_missing"], told["evaluation_images"]) == (12, 12, 12)
    assert told["views"] == views
    assert told["targets_bytes"] == 12 * (views + 1) * 64 * 2  # the evaluation images have one view each
    assert told["run_bytes"] > 10_000
    assert told["student_s"] > 0
    assert f"{stand_in} at 32 px, {page.training.epochs} epochs" in told["summary"]["student"]
    assert told["summary"]["classes"].startswith("2, ")
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "targets").exists()


def test_the_models_that_the_recipes_name_exist() -> None:
    """A rehearsal stands in for them, so that their names are checked here."""
    import open_clip
    import timm

    for name in shipped_recipes():
        page = load_recipe(name, overrides=["data.classes=[cat, dog]"])
        assert timm.is_model(page.student.model), name
        for teacher in page.teacher:
            tags = open_clip.list_pretrained_tags_by_model(teacher.model)
            assert teacher.model == "demo:digits" or teacher.weights in tags, name


def test_torchvision_has_the_datasets_and_splits_that_the_recipes_name(tmp_path: Path) -> None:
    """Each class is built, in an empty folder: it must miss its files, and nothing else."""
    from torchvision import datasets

    named = 0
    for recipe in shipped_recipes():
        data = load_recipe(recipe, overrides=["data.classes=[cat, dog]"]).data
        for spec in (data.images, data.evaluation or ""):
            source, _, rest = spec.partition(":")
            name, _, splits = rest.partition("/")
            for split in splits.split("+") if source == "torchvision" else ():
                make = getattr(datasets, name)
                options = split_options(name, split, inspect.signature(make).parameters)
                with pytest.raises(RuntimeError, match="not found"):
                    make(root=tmp_path, **options)
                named += 1
    assert named == 21


# Where a folder of Caltech-101 is spelled otherwise than by underscores in place of spaces.
CALTECH = {
    **{"off-center face": "Faces", "centered face": "Faces_easy", "leopard": "Leopards", "motorbike": "Motorbikes"},
    **{"airplane": "airplanes", "side of a car": "car_side", "body of a cougar cat": "cougar_body"},
    **{"face of a cougar cat": "cougar_face", "head of a crocodile": "crocodile_head", "water lily": "water_lilly"},
    **{"head of a flamingo": "flamingo_head", "snoopy (cartoon beagle)": "snoopy", "yin and yang symbol": "yin_yang"},
}
EUROSAT = (
    *("AnnualCrop", "Forest", "HerbaceousVegetation", "Highway", "Industrial"),
    *("Pasture", "PermanentCrop", "Residential", "River", "SeaLake"),
)


def caltech_files() -> dict[str, str]:
    folders = [CALTECH.get(name, name.replace(" ", "_")) for name in load_classes("caltech101")]
    assert folders == sorted(folders)
    return {f"caltech101/101_ObjectCategories/{name}/image_0001.jpg": "" for name in ("BACKGROUND_Google", *folders)}


def cars_files() -> dict[str, str]:
    """Stanford's annotations are in .mat files, written here by `write_cars`."""
    return {"stanford_cars/cars_train/1.jpg": "", "stanford_cars/devkit/README.txt": ""}


# torchvision's spec, the dataset's own files with a few of its images, and the class of each image in their order.
LAYOUTS: dict[str, tuple[str, Callable[[], dict[str, str]], list[str]]] = {
    "caltech101": ("Caltech101", caltech_files, list(load_classes("caltech101"))),
    "dtd": (
        "DTD/train+val",
        lambda: {
            "dtd/dtd/labels/train1.txt": "zigzagged/zigzagged_1.jpg\nbanded/banded_2.jpg\n",
            "dtd/dtd/labels/val1.txt": "polka-dotted/polka-dotted_3.jpg\n",
        },
        ["zigzagged", "banded", "polka-dotted"],
    ),
    "eurosat": (
        "EuroSAT",
        lambda: {f"eurosat/2750/{name}/{name}_1.jpg": "" for name in EUROSAT},
        list(load_classes("eurosat")),
    ),
    "fgvcaircraft": (
        "FGVCAircraft/trainval",
        lambda: {
            "fgvc-aircraft-2013b/data/variants.txt": "707-320\nF-16A/B\nYak-42\n",
            "fgvc-aircraft-2013b/data/images_variant_trainval.txt": "0000001 Yak-42\n0000002 F-16A/B\n",
        },
        ["Yak-42", "F-16A/B"],
    ),
    "food101": (
        "Food101/train",
        lambda: {
            "food-101/meta/train.json": json.dumps({"waffles": ["waffles/1"], "apple_pie": ["apple_pie/2"]}),
            "food-101/images/waffles/1.jpg": "",
        },
        ["waffles", "apple pie"],
    ),
    "oxfordpets": (
        "OxfordIIITPet/trainval",
        lambda: {
            "oxford-iiit-pet/annotations/trainval.txt": "Abyssinian_1 1 1 1\nbasset_hound_2 3 2 1\nboxer_3 2 2 1\n",
            "oxford-iiit-pet/images/Abyssinian_1.jpg": "",
        },
        ["Abyssinian", "basset hound", "boxer"],
    ),
    "stanfordcars": (
        "StanfordCars/train",
        cars_files,
        ["Ram C/V Cargo Van Minivan 2012", "AM General Hummer SUV 2000"],
    ),
    "sun397": (
        "SUN397",
        lambda: {
            "SUN397/ClassName.txt": "/a/abbey\n/t/theater/indoor_seats\n",
            "SUN397/t/theater/indoor_seats/sun_1.jpg": "",
        },
        ["theater indoor seats"],
    ),
}


def write_cars(root: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    pairs = np.array([("1.jpg", 2), ("2.jpg", 1)], dtype=[("fname", object), ("class", object)])
    savemat(root / "stanford_cars/devkit/cars_train_annos.mat", {"annotations": pairs})
    names = np.array(["AM General Hummer SUV 2000", "Ram C/V Cargo Van Minivan 2012"], dtype=object)
    savemat(root / "stanford_cars/devkit/cars_meta.mat", {"class_names": names})


@pytest.mark.parametrize("recipe", LAYOUTS)
def test_the_labels_in_a_datasets_own_files_are_the_recipes_classes(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images themselves are empty: a label is known without them."""
    spec, files, expected = LAYOUTS[recipe]
    for name, text in files().items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    if recipe == "stanfordcars":
        write_cars(tmp_path)
    monkeypatch.setenv("PRGKIT_DATA_ROOT", str(tmp_path))
    page = load_recipe(recipe)
    assert spec in page.data.images
    images = open_images(f"torchvision:{spec}")
    labels = images.labels(range(len(images)), page.classes)
    indices = class_indices(labels, page.classes, names=[images.name(i) for i in range(len(images))], where=spec)
    assert [page.classes[index] for index in indices] == expected


def test_flowers_are_in_torchvisions_order() -> None:
    """Its labels are in files that cannot be made up, its names in its code; three of them read better in CLIP's words."""
    from torchvision import datasets

    pairs = zip(datasets.Flowers102.classes, load_classes("flowers102"), strict=True)
    assert {theirs: ours for theirs, ours in pairs if theirs != ours} == {
        "globe-flower": "globe flower",
        "pink-yellow dahlia?": "pink and yellow dahlia",
        "ball moss": "air plant",
    }


def test_the_folders_of_ucf101s_frames_are_its_classes() -> None:
    labels = ["Apply_Eye_Makeup", "Handstand_Pushups", "Yo_Yo"]
    assert list(class_indices(labels, load_classes("ucf101"), names=labels, where="")) == [0, 36, 100]
