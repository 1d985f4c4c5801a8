"""Recipes: what a page may say, how its mistakes are told, and what makes two runs different."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from prgkit.config.objectives import OBJECTIVES
from prgkit.config.prompts import load_classes
from prgkit.config.recipe import (
    NOT_LEARNED_FROM,
    Recipe,
    find_recipe,
    load_recipe,
    save_recipe,
    shipped_recipes,
    validate,
)
from prgkit.config.sections import Data, ImageSpec, LabelFormat
from prgkit.config.yaml_io import parse_yaml
from prgkit.data.sources import open_images
from prgkit.errors import ImagesError, RecipeError
from prgkit.storage.run import changed_keys

PAGE = """
data: {images: photos/, classes: [cat, dog]}
teacher: {model: ViT-B-16, weights: openai}
student: {model: repvit_m0_9}
objective: {name: prg}
"""


def page(text: str) -> dict[str, Any]:
    """Return a page that is right, with some sections replaced."""
    return {**parse_yaml(PAGE, where="test"), **parse_yaml(text, where="test")}


def mistakes(text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        validate(page(text), where="mine.yaml")
    return str(caught.value)


def mistake(text: str) -> str:
    """Return the one mistake of a page."""
    first, only, where = mistakes(text).split("\n")
    assert first == "the recipe has a mistake:"
    assert where == "  where: mine.yaml"
    return only.strip()


# What is shipped.


@pytest.fixture(autouse=True)
def _no_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET", raising=False)


def loaded(name: str) -> Recipe:
    if name == "imagenet1k":
        pytest.importorskip("open_clip", reason="ImageNet's class names come with open_clip")
    overrides = ["data.classes=[cat, dog]"] if name == "custom" else []
    return load_recipe(name, overrides=overrides)


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_loads_and_comes_back_from_a_run_the_same(name: str, tmp_path: Path) -> None:
    recipe = loaded(name)
    assert recipe.classes == load_classes({"custom": ["cat", "dog"], "demo": "digits"}.get(name, name))
    assert all(template.count("{}") == 1 for template in recipe.templates)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(str(tmp_path / "recipe.yaml"))
    assert again == recipe
    assert again.fingerprint() == recipe.fingerprint()


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_is_a_page_with_its_command_on_top(name: str) -> None:
    lines = find_recipe(name).read_text().splitlines()
    assert lines[0].startswith("# Distil ")
    assert lines[0].endswith(".")
    assert any(line.startswith("#   prgkit ") for line in lines[1:3])
    assert max(map(len, lines)) <= 130


def test_imagenet_is_found_where_the_variable_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    images = loaded("imagenet1k").data.images
    with pytest.raises(ImagesError, match=r"\$IMAGENET is not set"):
        open_images(images)
    monkeypatch.setenv("IMAGENET", str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(ImagesError, match="holds no images"):
        open_images(images)


def test_lists_and_single_words_are_read_alike(tmp_path: Path) -> None:
    weighted = page("objective: [{name: ce}, {name: prg, weight: 0.5}]")
    recipe = validate(weighted, where="test").resolved()
    assert recipe.objective_name == "ce + prg"
    assert [objective.weight for objective in recipe.objective] == [1.0, 0.5]
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
    (tmp_path / "names.txt").write_text("# three\ncat\ndog\n\nhot dog\n")
    from_file = validate(page(f"data: {{images: a, classes: {tmp_path}/names.txt, prompts: 'a {{}}'}}"), where="test")
    assert from_file.resolved().classes == ("cat", "dog", "hot dog")
    assert from_file.resolved().templates == ("a {}",)


def test_a_size_is_a_number_or_height_and_width(mine: str) -> None:
    square = load_recipe(mine, overrides=["student.image_size=64"])
    same = load_recipe(mine, overrides=["student.image_size=[64, 64]"])
    assert (same.student.image_size, same.fingerprint()) == (64, square.fingerprint())
    assert square.views.aspect is None
    tall = load_recipe(mine, overrides=["student.image_size=[128, 64]"])
    assert tall.student.image_size == (128, 64)
    assert tall.views.aspect == 0.5  # crops are drawn in the student's shape
    assert tall.model_dump(mode="json")["student"]["image_size"] == [128, 64]
    assert load_recipe(mine, overrides=["student.image_size=[128, 64]", "views.aspect=1"]).views.aspect == 1
    for wrong, told in (
        ("[128]", "student.image_size[1]: missing"),
        ("[128, 8]", "student.image_size[1]: must be greater than or equal to 16, not 8"),
        ("8", "student.image_size: must be greater than or equal to 16, not 8"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(mine, overrides=[f"student.image_size={wrong}"])
        assert told in caught.value.what


# How mistakes are told.


def test_all_mistakes_of_a_page_are_told_at_once() -> None:
    text = """
data: {imges: photos/, classes: [cat, 7, no]}
teacher: {model: ViT-B-16, precision: fp61}
student: {model: repvit_m0_9, image_size: "224"}
objective: {name: prg, block: softmx, alpha: 0.5}
training: {learning_rate: 1e-3, epoch: 5, ema: 2, count: 3}
epochs: 100
"""
    assert mistakes(text) == (
        "the recipe has 13 mistakes:\n"
        "    data.images: missing\n"
        "    data.classes[1]: YAML reads 7 as a number; put it in quotes\n"
        "    data.classes[2]: YAML reads yes, no, on and off as false; put the word in quotes\n"
        "    data.imges: unknown key; did you mean 'images'?\n"
        "    teacher.precision: 'fp61' is none of auto, fp32, bf16; did you mean 'fp32'?\n"
        "    student.image_size: YAML reads 224 as text; write 224, without quotes\n"
        "    objective.block: 'softmx' is none of softmax, zscore, l2, raw; did you mean 'softmax'?\n"
        "    objective.alpha: unknown key; it is a parameter of kd and dkd\n"
        "    training.learning_rate: YAML reads 1e-3 as text; write 0.001, with a dot and no quotes\n"
        "    training.ema: must be less than 1, not 2\n"
        "    training.epoch: unknown key; did you mean 'epochs'?\n"
        "    training.count: unknown key; it belongs in views.count\n"
        "    epochs: unknown key; it belongs in training.epochs\n"
        "  where: mine.yaml"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("traning: {}", "traning: unknown key; did you mean 'training'?"),
        ("student: {model: a, seed: 1}", "student.seed: unknown key; it belongs in views.seed or training.seed"),
        ("training: {node_weight: 1}", "training.node_weight: unknown key; it belongs in objective.node_weight"),
        ("zzz: 1", "zzz: unknown key; known: data, teacher, views, targets, student, objective, training, export"),
        (
            "objective: {}",
            f"objective.name: missing; known: {', '.join(OBJECTIVES)}",
        ),
        (
            "objective: {name: pgr}",
            f"objective.name: unknown objective 'pgr', known are {', '.join(OBJECTIVES)}; did you mean 'prg'?",
        ),
        ("objective: ce", "objective: write a mapping such as {name: prg}, not 'ce'"),
        ("objective: []", "objective: name at least one"),
        ("objective: [{name: ce}, {name: kd, alpa: 1}]", "objective[1].alpa: unknown key; did you mean 'alpha'?"),
        ("objective: [{name: ce}, {name: kd, alpha: 2}]", "objective[1].alpha: must be less than or equal to 1, not 2"),
        (
            "objective: [{name: ce}, {name: kd, prompt_weighting: mean}]",
            "objective: every objective of a list must name the same prompt_weighting",
        ),
        ("training: {epochs: 1e2}", "training.epochs: YAML reads 1e2 as text; write 100, without quotes"),
        ("training: {epochs: 2.5}", "training.epochs: must be a whole number, not 2.5"),
        ("training: {seed: -1}", "training.seed: must be greater than or equal to 0, not -1"),
        (f"training: {{seed: {2**63}}}", f"training.seed: must be less than {2**63}, not {2**63}"),
        ("training: {learning_rate: .inf}", "training.learning_rate: must be a finite number, not inf"),
        ("training: {compile: 1}", "training.compile: must be true or false, not 1"),
        ("training:", "training: empty"),
        ("views: 8", "views: write a mapping such as {key: value}, not 8"),
        (
            "views: {crop_scale: [1, 0.5]}",
            "views.crop_scale: must be [low, high] with 0 < low <= high <= 1, not [1, 0.5]",
        ),
        ("targets: {debias: 1.5}", "targets.debias: must be less than or equal to 1, not 1.5"),
        (
            "data: {images: photos, classes: [a, b], prompts: photo, evaluation_labels: truth.csv}",
            "data.evaluation_labels: name the images too that it labels, as data.evaluation",
        ),
        (
            "data: {images: photos, classes: [a, b], prompts: photo, labelled_labels: truth.csv}",
            "data.labelled_labels: name the images too that it labels, as data.labelled",
        ),
        (
            "data: {images: photos, classes: [a, b], prompts: photo, keep: {by_class: true}}",
            "data.keep.by_class: only min_confidence and weighted read it, and neither is asked for",
        ),
        ("targets: {refine: transclip}", "targets.refine: 'transclip' is none of inmap, stata"),
        ("targets: {prior: even}", "targets.prior: only refine: inmap and debias read it, and neither is asked for"),
        (
            "targets: {debias: 1, prior: {a: 1, b: -0.5}}",
            "targets.prior.b: must be greater than or equal to 0, not -0.5",
        ),
        ("targets: {debias: yes}", "targets.debias: must be a number, not True"),
        (
            "targets: {average: probabilities}",
            "targets.average: it is of several teachers, and the recipe names one",
        ),
        ("targets: {average: product}", "targets.average: 'product' is none of probabilities, confidence"),
        (
            "objective: {name: aspects}",
            "data.words: give phrases that are no classes, since an objective asks about them",
        ),
        ("targets: {entropy: 1}", "targets.entropy: must be less than 1, not 1"),
        ("targets: {temperature: 2.0}", "targets.temperature: unknown key; it belongs in objective.temperature"),
        ("targets: {debais: 0.5}", "targets.debais: unknown key; did you mean 'debias'?"),
        (
            "data: {images: a, classes: cifar10, keep: {min_confidence: 1.0}}",
            "data.keep.min_confidence: must be less than 1, not 1.0",
        ),
        (
            "data: {images: a, classes: cifar10, keep: {confidence: 0.5}}",
            "data.keep.confidence: unknown key; did you mean 'min_confidence'?",
        ),
        ("data: {images: a, classes: cifar10, keep: 0.5}", "data.keep: write a mapping such as {key: value}, not 0.5"),
        ("keep: {weighted: true}", "keep: unknown key; it belongs in data.keep"),
        ("export: {batch: [1, 8]}", "export.batch[2]: missing"),
        (
            "export: {opset: 16}",
            "export.opset: must be 17 to 23; ONNX Runtime 1.12 and newer run 17, 1.15 18, 1.16 19, 1.17 20, not 16",
        ),
        ("export: {batch: [1, 2, 3, 4]}", "export.batch: must have 3 values"),
        (
            "export: {batch: [1, 8, 4]}",
            "export.batch: must be [min, opt, max] with 1 <= min <= opt <= max, not [1, 8, 4]",
        ),
        (
            "data: {images: no, classes: cifar10}",
            "data.images: YAML reads yes, no, on and off as false; put the word in quotes",
        ),
    ],
)
def test_a_mistake_is_told_with_its_path_and_what_is_right(text: str, told: str) -> None:
    assert mistake(text) == told


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "a: 1\nb: [1, 2\nc: 3\n",
            "the recipe is no valid YAML: expected ',' or ']', but got ':'\n  where: x.yaml, line 3",
        ),
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice; keep one\n  where: x.yaml, line 3"),
        ("a: &x 1\nb: *x\n", "an alias (*name) stands for a value; write the value out\n  where: x.yaml, line 2"),
        ("? [a, b]\n: 3\n", "a key is a single word; write key: value\n  where: x.yaml, line 1"),
        ("a: !!python/object:os.system {}\n", "the recipe is no valid YAML: could not determine a constructor"),
        ("[1, 2]", "the recipe is no mapping of sections\n  where: x.yaml\n  fix: prgkit recipes --show custom"),
        ("", "the recipe is no mapping of sections"),
        ("[" * 3000, "the recipe is nested too deeply"),
    ],
)
def test_broken_yaml_is_told_with_its_line(text: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, where="x.yaml")
    assert str(caught.value).startswith(told)


def test_a_page_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"data: {images: caf\xe9}")
    with pytest.raises(RecipeError, match="the recipe cannot be read: it is not UTF-8 text"):
        load_recipe(str(tmp_path / "mine.yaml"))


def test_unknown_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(PAGE)
    Path("photos").mkdir()
    choose = f"\n  fix: choose one of {', '.join(shipped_recipes())}, or give the path of a .yaml file"
    for name, told in {
        "cifar10O": f"unknown recipe 'cifar10O'; did you mean 'cifar10'?{choose}",
        "mine": f"unknown recipe 'mine'; did you mean 'mine.yaml'?{choose}",
        "min.yaml": f"there is no recipe file min.yaml; did you mean 'mine.yaml'?{choose}",
        "photos": "photos is a folder, not a recipe\n  fix: --images photos --classes FILE needs no recipe",
    }.items():
        with pytest.raises(RecipeError) as caught:
            load_recipe(name)
        assert str(caught.value) == told


# --set.


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.yaml").write_text(PAGE)
    return str(tmp_path / "mine.yaml")


def test_set_reads_values_as_yaml(mine: str) -> None:
    recipe = load_recipe(
        mine,
        overrides=[
            "training.epochs=5",
            "data.classes=[ripe tomato, leaf]",
            "teacher.weights=null",
            "views.crop_scale=[0.5, 1.0]",
            "student.initial='a=b.safetensors'",
            "views={count: 2}",
        ],
    )
    assert recipe.training.epochs == 5
    assert recipe.classes == ("ripe tomato", "leaf")
    assert recipe.teacher[0].weights is None
    assert recipe.views.crop_scale == (0.4, 1.0)  # the whole section was set after it
    assert recipe.views.count == 2
    assert recipe.student.initial == "a=b.safetensors"


def test_another_objective_drops_the_parameters_of_the_first(mine: str) -> None:
    prg = ["objective.node_weight=1.5", "objective.prompt_weighting=mean", "objective.weight=2.0"]
    recipe = load_recipe(mine, overrides=[*prg, "objective.name=kd", "objective.alpha=0.5"])
    (objective,) = recipe.objective
    assert objective.model_dump() == {
        "weight": 2.0,
        "prompt_weighting": "mean",
        "standardise": None,
        "name": "kd",
        "alpha": 0.5,
        "temperature": 4.0,
    }
    for page, name in (("{name: kd, temperature: 7}", "ofa"), ("{name: promptkd, kl_weight: 10}", "nd")):
        (other,) = load_recipe(mine, overrides=[f"objective={page}", f"objective.name={name}"]).objective
        assert other == OBJECTIVES[name](name=name)  # its own defaults, also of what both have
    given = ["objective={name: kd, temperature: 7}", "objective.temperature=3"]
    for overrides, temperature in (([*given, "objective.name=ofa"], 3.0), ([*given[:1], "objective.name=kd"], 7.0)):
        (other,) = load_recipe(mine, overrides=overrides).objective
        assert other.model_dump()["temperature"] == temperature
    with pytest.raises(RecipeError, match="unknown objective 'kdd'"):
        load_recipe(mine, overrides=["objective.name=kdd"])
    with pytest.raises(RecipeError, match="objective"):
        load_recipe(mine, overrides=["objective.name=[kd]"])


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.epochs", "--set takes KEY=VALUE, not 'training.epochs'\n  fix: for example --set training.epochs=5"),
        ("=5", "--set takes KEY=VALUE, not '=5'"),
        ("training.=5", "--set takes KEY=VALUE, not 'training.=5'"),
        ("data.classes.first=cat", "--set data.classes.first: data.classes is no section of keys"),
        (
            "data.classes=[a, b",
            "the recipe is no valid YAML: expected ',' or ']', but got '<stream end>'\n"
            "  where: --set data.classes=[a, b, line 1",
        ),
        (
            "training.epoch=5",
            "the recipe has a mistake:\n    training.epoch: unknown key; did you mean 'epochs'?\n"
            "  where: {mine}, with training.epoch=5",
        ),
        (
            "training.learning_rate=1e-05",
            "the recipe has a mistake:\n    training.learning_rate: YAML reads 1e-05 as text; write 1.0e-05, with a dot",
        ),
    ],
)
def test_a_set_that_cannot_be(mine: str, override: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(mine, overrides=[override])
    assert str(caught.value).startswith(told.replace("{mine}", mine))


# Classes and prompts.


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("data.classes=[cat, dog, Cat]", "class names repeat: 'Cat' (entry 1 and entry 3)"),
        ("data.classes=[cat]", "there is only one class, 'cat'"),
        ("data.classes=[]", "there are no class names"),
        ("data.classes=cifar-100", "there is no class list 'cifar-100'; did you mean 'cifar100'?"),
        ("data.prompts=[a photo]", "the template 'a photo' has not exactly one {}"),
        ("data.prompts=photos", "there is no template set 'photos'; did you mean 'photo'?"),
        ("data.prompts=[]", "there are no prompt templates"),
    ],
)
def test_bad_classes_and_prompts(mine: str, override: str, told: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(mine, overrides=[override])
    assert caught.value.what == told
    assert caught.value.fix


# What makes two runs different.


def test_the_fingerprint_is_of_what_is_learned_from(mine: str) -> None:
    recipe = load_recipe(mine)
    same = [
        "export.batch=[1, 8, 8]",
        "training.workers=3",
        "training.trackers=[wandb]",
        "training.checkpoint_minutes=1.0",
        "data.evaluation=labelled/",
        "data.evaluation_labels=labels.csv",
    ]
    for count in range(1, len(same) + 1):
        assert load_recipe(mine, overrides=same[:count]).fingerprint() == recipe.fingerprint(), same[count - 1]


def test_how_labels_are_read_is_learned_from_where_labels_are(mine: str) -> None:
    from_1, dho = "data.label_format.first_number=1", ["data.labelled=shots/", "objective={name: dho}"]
    plain, learner = load_recipe(mine), load_recipe(mine, overrides=dho)
    assert changed_keys(plain, load_recipe(mine, overrides=[from_1])) == []
    counted = load_recipe(mine, overrides=[*dho, from_1])
    assert changed_keys(learner, counted) == changed_keys(counted, learner) == ["data.label_format.first_number"]
    assert counted.fingerprint() != learner.fingerprint()
    spelled = load_recipe(mine, overrides=[*dho, "data.label_format={}"])
    assert spelled.fingerprint() == learner.fingerprint()  # so that a run outlives the key


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_everything_else_changes_it(mine: str) -> None:
    """Change every value of the page that is not excluded, each in a way that is valid."""
    recipe = load_recipe(mine)
    seen = {recipe.fingerprint()}
    other = {
        "data.classes": ["cat", "cow"],
        "data.prompts": ["a {}"],
        "data.words": ["old / new", "red"],
        "data.labelled": "shots/",
        "data.labelled_labels": "shots.csv",
        "teacher.context": "adapted/mine.safetensors",
        "teacher.precision": "bf16",
        "teacher.batch_size": 32,
        "teacher.weights": "b",
        "views.crop_scale": [0.3, 1.0],
        "views.aspect": 0.5,
        "views.mixed": 2,
        "data.keep.min_confidence": 0.5,
        "data.keep.by_class": True,
        "targets.refine": "inmap",
        "targets.prior": "even",
        "targets.debias": 0.5,
        "targets.entropy": 0.3,
        "targets.average": "confidence",
        "student.crop": 0.9,
        "objective.name": "kd",
        "objective.prompt_weighting": "mean",
        "objective.supervision": "hard",
        "objective.block": "l2",
        "training.optimizer": "sgd",
        "training.precision": "bf16",
        "training.gradient_clip": None,
        "training.mixup": 0.2,
        "training.class_weights": "balanced",
    }
    # What nothing reads is refused, and so is an average of one teacher.
    two = "teacher=[{model: a, weights: b}, {model: c, weights: d}]"
    readers = {
        "data.labelled_labels": ["data.labelled=shots/"],
        "data.keep.by_class": ["data.keep.weighted=true"],
        "targets.prior": ["targets.debias=1"],
        "targets.average": [two],
    }
    seen.add(load_recipe(mine, overrides=[two]).fingerprint())
    for key, value in leaves(recipe.model_dump(mode="json", exclude=NOT_LEARNED_FROM)).items():
        if key not in other:
            kinds = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 0.9, str: lambda v: f"{v}x"}
            other[key] = kinds[type(value)](value)
        value_text = yaml.safe_dump(other[key], default_flow_style=True)
        changed = load_recipe(mine, overrides=[*readers.get(key, []), f"{key}={value_text}"])
        assert changed.fingerprint() not in seen, key
        seen.add(changed.fingerprint())
    assert len(seen) > 30


def test_images_and_classes_that_are_named_apart_are_taken_letter_for_letter() -> None:
    recipe = load_recipe("custom", images="a: b #c, 'd'", classes="cifar10", overrides=["training.epochs=5"])
    assert (recipe.data.images, len(recipe.classes), recipe.training.epochs) == ("a: b #c, 'd'", 10, 5)
    assert load_recipe("custom", images="a", classes="cifar10", overrides=["data.images=b"]).data.images == "b"
    assert load_recipe("demo", images="").data.images == ""  # a variable that is not set: not the recipe's own
    with pytest.raises(RecipeError, match="there is no class list ''"):
        load_recipe("demo", classes="")
    with pytest.raises(RecipeError) as caught:
        load_recipe("custom", images="a", overrides=["training.epochs=0"])
    assert str(caught.value.where).endswith("custom.yaml, with data.images=a, training.epochs=0")


def test_each_source_of_images_has_its_own_table_of_labels() -> None:
    data = Data(
        images="photos", evaluation="photos", evaluation_labels="judged.csv", labelled="photos",
        classes=("cat", "dog"), label_format=LabelFormat(first_number=1),
    )  # fmt: skip
    assert data.image_spec == ImageSpec("photos", None, data.label_format)
    assert data.evaluation_spec == ImageSpec("photos", Path("judged.csv"), data.label_format)
    assert data.labelled_spec == ImageSpec("photos", None, data.label_format)
    assert data.model_copy(update={"labelled": None}).labelled_spec is None


# Words that are no classes, and too few classes.


def test_words_are_written_out_and_leave_no_trace_where_there_are_none(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("striped / plain\nfur\n")
    plain = validate(page("{}"), where="test")
    given = validate(page(f"data: {{images: a, classes: [cat, dog], words: {tmp_path}/words.txt}}"), where="test")
    assert given.resolved().words == ("striped / plain", "fur")
    assert plain.resolved().words == ()
    assert "words" not in plain.model_dump(exclude_none=True)["data"]


def test_a_word_is_a_phrase_or_a_pair() -> None:
    recipe = validate(page("data: {images: a, classes: [cat, dog], words: [fur, old / new / newer]}"), where="test")
    with pytest.raises(RecipeError, match="is no contrast pair"):
        recipe.resolved()


def test_vocabulary_has_several_phrases_to_compare() -> None:
    def resolved(name: str, word: str) -> Recipe:
        data = f"data: {{images: a, classes: [cat, dog], words: [{word}]}}"
        return validate(page(f"{data}\nobjective: {{name: {name}}}"), where="test").resolved()

    with pytest.raises(RecipeError, match="vocabulary compares phrases with each other, and 'fur' is the only one"):
        resolved("vocabulary", "fur")
    assert resolved("vocabulary", "old / new").words == ("old / new",)
    assert resolved("aspects", "fur").words == ("fur",)


@pytest.mark.parametrize("name", ["kd", "dkd"])
def test_two_classes_are_not_standardised(name: str) -> None:
    recipe = validate(page(f"objective: {{name: {name}, standardise: true}}"), where="test")
    with pytest.raises(RecipeError, match="of 2 classes a standardised logit says which one is larger"):
        recipe.resolved()
    three = recipe.model_copy(update={"data": recipe.data.model_copy(update={"classes": ("cat", "dog", "owl")})})
    assert three.resolved().objective[0].name == name
