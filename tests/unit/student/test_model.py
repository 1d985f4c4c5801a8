"""The student: any timm model with one head and a projector that stays at home, and short errors for what cannot be."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from prgkit.config.recipe import validate
from prgkit.config.sections import StudentConfig
from prgkit.errors import StudentError
from prgkit.storage.run import Run, start_run
from prgkit.student.model import build_student, load_student, reparameterised, student_facts, student_preprocessing
from prgkit.student.timm_model import timm_config
from prgkit.training.checkpoint import save_tensors

CLASSES, WIDTH = 7, 12
MODELS = [
    ("repvit_m0_9", 64),
    ("efficientnet_b0", 64),
    ("test_resnet", 48),
    ("mobilenetv3_small_050", 64),
    ("test_vit", 160),
    ("test_convnext", 32),
]


def page(model: str = "test_resnet", image_size: int = 48, **facts: Any) -> StudentConfig:
    return StudentConfig(model=model, image_size=image_size, **facts)


def build(*given: Any, classes: int = CLASSES, **facts: Any) -> Any:
    torch.manual_seed(0)
    return build_student(page(*given, **facts), classes=classes, teacher_width=WIDTH)


def pixels(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def error_of(*given: Any, **facts: Any) -> StudentError:
    with pytest.raises(StudentError) as caught:
        build(*given, **facts)
    return caught.value


@pytest.mark.parametrize(("model", "size"), MODELS)
def test_features_and_logits_of_a_family(model: str, size: int) -> None:
    student = build(model, size).eval()
    with torch.no_grad():
        side = student(pixels(3, size))
        deployed = student.inference_model()(pixels(3, size))
    assert side.features.shape == (3, WIDTH)
    assert side.logits.shape == (3, CLASSES)
    torch.testing.assert_close(deployed, side.logits, atol=1e-5, rtol=1e-5)
    assert side.logits.std() > 0
    assert not torch.allclose(side.features[0], side.features[1])


def test_a_deployed_student_has_no_projector_and_is_a_copy() -> None:
    student = build()
    deployed = student.inference_model()
    assert "projector.weight" in student.state_dict()
    assert set(deployed.state_dict()) == {name for name in student.state_dict() if name.startswith("model.")}
    assert not deployed.training
    assert student.training
    before = student.model.fc.weight.clone()
    deployed.model.fc.weight.data.zero_()
    assert torch.equal(student.model.fc.weight, before)


def test_normalisation_by_hand() -> None:
    student = build("test_vit", 160)
    mean, std = timm.get_pretrained_cfg("test_vit").mean, timm.get_pretrained_cfg("test_vit").std
    given = pixels(2, 160)
    expected = (given.numpy().transpose(0, 3, 1, 2) / 255 - np.array(mean)[:, None, None]) / np.array(std)[
        :, None, None
    ]
    np.testing.assert_allclose(student.images(given).numpy(), expected, atol=1e-6)


def test_repvit_has_one_head() -> None:
    assert any("head_dist" in name for name in timm.create_model("repvit_m0_9").state_dict())
    student = build("repvit_m0_9", 64)
    assert not any("head_dist" in name for name in student.state_dict())
    assert student.model.get_classifier().head.l.out_features == CLASSES


def test_reparameterising_changes_the_layers_and_not_the_logits() -> None:
    model = build("repvit_m0_9", 64).model.eval()
    fused = reparameterised(model)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(fused(images), model(images), atol=1e-4, rtol=1e-4)
    norms = [sum(isinstance(layer, torch.nn.BatchNorm2d) for layer in net.modules()) for net in (model, fused)]
    assert norms[0] > 50
    assert norms[1] == 0


@pytest.mark.parametrize(
    ("model", "classes", "parameters"),
    [
        ("efficientnet_b0", 1000, 5_288_548),  # as its paper has it: 5.3 million
        ("repvit_m0_9", 100, 4_720_556),  # 4,757,060 before its branches and batch norms are fused
    ],
)
def test_facts_count_what_is_deployed(model: str, classes: int, parameters: int) -> None:
    assert build(model, 64, classes=classes).facts(page(model, 64)).parameters == parameters


def test_facts_say_what_the_student_is() -> None:
    student = build()
    facts = student.facts(page())
    assert (facts.model, facts.initial) == ("test_resnet", "random")
    assert facts.preprocessing == student.preprocessing.to_dict()


def test_the_crop_is_timms_only_where_the_start_is_pretrained() -> None:
    config = timm.get_pretrained_cfg("efficientnet_b0")
    assert config.crop_pct == 0.875
    scratch = student_preprocessing(page("efficientnet_b0", 64))
    assert (scratch.crop, scratch.image_size, scratch.squash) == (1.0, 64, False)
    assert (scratch.mean, scratch.std, scratch.interpolation) == (config.mean, config.std, "bicubic")
    assert student_preprocessing(page("efficientnet_b0", 64, initial="pretrained")).crop == 0.875
    assert student_preprocessing(page("efficientnet_b0", 64, initial="pretrained", crop=0.9)).crop == 0.9
    assert student_preprocessing(page("efficientnet_b0", 64, crop=0.9)).crop == 0.9


@pytest.mark.parametrize("classes", [CLASSES, 1000])
@pytest.mark.parametrize("model", ["repvit_m0_9", "test_resnet"])
def test_a_weights_file_starts_the_backbone_and_never_the_head(model: str, classes: int, tmp_path: Path) -> None:
    torch.manual_seed(7)
    saved = timm.create_model(model).state_dict()
    save_file(saved, tmp_path / "model.safetensors")
    student = build(model, 64, initial=str(tmp_path / "model.safetensors"), classes=classes)
    head = {id(parameter) for parameter in student.model.get_classifier().parameters()}
    fresh = {name for name, parameter in student.model.named_parameters() if id(parameter) in head}
    fresh = {name for name in fresh if not name.startswith("head.head.bn")}  # RepViT's head has a norm before it
    weights = student.model.state_dict()
    assert len(weights.keys() - fresh) > 50
    for name in weights.keys() - fresh:
        assert torch.equal(weights[name], saved[name]), name
    for name in fresh:
        if name.endswith("weight"):
            assert weights[name].shape != saved[name].shape or not torch.equal(weights[name], saved[name])


def test_a_weights_file_of_another_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), path)
    error = error_of("resnet10t", 64, initial=str(path))
    assert error.what.startswith("the file cannot start resnet10t: ")
    assert (error.where, error.fix) == (path, "give the weights of resnet10t as timm saves them")
    # Every shape fits, and half of it would be left out.
    save_file(timm.create_model("resnet34").state_dict(), path)
    assert "weights are in one of the two only, e.g. layer" in error_of("resnet18", 64, initial=str(path)).what
    path.write_bytes(path.read_bytes()[:-100])
    assert error_of("resnet18", 64, initial=str(path)).what.startswith("the file cannot start resnet18: ")


def test_what_is_no_weights_file_is_refused(tmp_path: Path) -> None:
    error = error_of(initial="pretraned")
    assert str(error) == (
        "there is no weights file 'pretraned'; did you mean 'pretrained'?\n  where: student.initial\n"
        "  fix: write random, pretrained, the folder of a run, or the path of a weights file (.safetensors, .pth, .pt, .bin, .ckpt, .tar)"
    )
    (tmp_path / "model.pt").touch()
    assert error_of(initial=str(tmp_path / "model.pt")).what.startswith("the file cannot start test_resnet: ")
    assert error_of(initial=str(tmp_path)).what == (f"student.initial names a folder, which holds model.pt: {tmp_path}")
    (tmp_path / "model.onnx").touch()
    assert error_of(initial=str(tmp_path / "model.onnx")).what == "model.onnx is no weights file by its name"


class Evil:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def wrapped(form: str, weights: dict[str, torch.Tensor]) -> Any:
    """Weights as several trainers save them."""
    blank = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    return {
        "plain": weights,
        "state_dict": {"epoch": 3, "arch": "test_resnet", "state_dict": weights, "args": argparse.Namespace(lr=0.1)},
        "ema": {"state_dict": blank, "state_dict_ema": weights},
        "model": {"model": weights, "optimizer": {}},
        "parallel": {"state_dict": {f"module.{name}": tensor for name, tensor in weights.items()}},
        "tutorial": {"epoch": 3, "model_state_dict": weights},
        "lightning": {"state_dict": {f"model.{name}": tensor for name, tensor in weights.items()}},
        "ours": {**{f"model.{name}": tensor for name, tensor in weights.items()}, "projector.weight": torch.ones(2, 2)},
    }[form]


@pytest.mark.parametrize("form", ["plain", "state_dict", "ema", "model", "parallel", "tutorial", "lightning", "ours"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt", ".pth.tar"])
def test_a_checkpoint_starts_the_backbone_whatever_it_is_wrapped_in(form: str, suffix: str, tmp_path: Path) -> None:
    saved = timm.create_model("test_resnet").state_dict()
    torch.save(wrapped(form, saved), tmp_path / f"mine{suffix}")
    weights = build(initial=str(tmp_path / f"mine{suffix}")).model.state_dict()
    assert all(torch.equal(weights[name], saved[name]) for name in saved if not name.startswith("fc."))


def test_a_runs_own_student_starts_another(tmp_path: Path) -> None:
    first = build(classes=3)
    save_tensors(tmp_path / "student.safetensors", first.state_dict(), {"epoch": 3})
    second = build(initial=str(tmp_path / "student.safetensors")).model.state_dict()
    kept = {name: tensor for name, tensor in first.model.state_dict().items() if not name.startswith("fc.")}
    assert all(torch.equal(second[name], tensor) for name, tensor in kept.items())


def test_a_checkpoint_that_is_not_all_of_the_backbone_is_refused(tmp_path: Path) -> None:
    saved, path = timm.create_model("test_resnet").state_dict(), tmp_path / "mine.pth"
    for held, told in (
        ({}, "it holds no tensors by name"),
        ({"state_dict": {}}, "it holds no tensors by name"),
        ({**saved, "conv1.0.weight": saved["conv1.0.weight"] * torch.nan}, "no numbers, e.g. conv1.0.weight"),
        ({"epoch": 3, "optimizer": {}}, "it holds no tensors by name"),
        ({name: tensor for name, tensor in saved.items() if name != "conv1.0.weight"}, "e.g. conv1.0.weight"),
        ([1, 2], "'list' object"),
    ):
        torch.save(held, path)
        error = error_of(initial=str(path))
        assert error.what.startswith("the file cannot start test_resnet: ")
        assert told in error.what
        assert error.where == path


def test_a_checkpoints_code_is_never_run(tmp_path: Path) -> None:
    path, loot = tmp_path / "mine.pth", tmp_path / "owned"
    for write in (torch.save, lambda held, path: path.write_bytes(pickle.dumps(held))):
        write({"state_dict": {"conv1.0.weight": Evil(loot)}}, path)
        error = error_of(initial=str(path))
        assert "holds more than tensors" in error.what
        assert "weights_only" not in str(error)  # PyTorch's advice to run it after all
    assert not loot.exists()


def saved_for_the_hub(folder: Path, model: str = "test_resnet", lost: str | None = None) -> dict[str, torch.Tensor]:
    """Write a model as timm saves one for the hub: other mean and crop than timm's own, and all weights but one."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(5)
    weights = {name: tensor for name, tensor in timm.create_model(model).state_dict().items() if name != lost}
    facts = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.5], "crop_pct": 0.9, "interpolation": "bilinear"}
    config = {"architecture": model, "num_classes": 1000, "pretrained_cfg": {**facts, "classifier": "fc"}}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """Take the network away, and return where somebody/mine lies in the hub's cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    timm_config.cache_clear()
    place = cache / "models--somebody--mine"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    return place / "snapshots" / "abc"


@pytest.mark.parametrize("source", ["hf-hub:", "hf_hub:", "local-dir:"])
def test_a_model_of_the_hub_is_prepared_and_starts_as_its_files_say(
    source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = hub(monkeypatch, tmp_path)
    saved = saved_for_the_hub(folder)
    name = f"local-dir:{folder}" if source == "local-dir:" else f"{source}somebody/mine"
    student = build(name, initial="pretrained")
    assert (student.preprocessing.mean, student.preprocessing.crop) == ((0.1, 0.2, 0.3), 0.9)
    assert student.preprocessing.interpolation == "bilinear"
    weights = student.model.state_dict()
    assert all(torch.equal(weights[key], saved[key]) for key in saved if not key.startswith("fc."))
    scratch = build(name)
    assert (scratch.preprocessing.mean, scratch.preprocessing.crop) == ((0.1, 0.2, 0.3), 1.0)
    assert not torch.equal(scratch.model.state_dict()["conv1.0.weight"], saved["conv1.0.weight"])


def test_a_hub_models_weights_that_are_not_all_there_are_refused(tmp_path: Path) -> None:
    saved_for_the_hub(tmp_path / "mine", lost="layer2.0.conv1.weight")
    error = error_of(f"local-dir:{tmp_path / 'mine'}", initial="pretrained")
    assert "1 weights are not in the file, e.g. layer2.0.conv1.weight" in error.what


def test_a_hub_model_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub(monkeypatch, tmp_path)
    error = error_of("hf-hub:somebody/mine")
    assert error.what.startswith("the configuration of hf-hub:somebody/mine cannot be had (")
    assert error.where == "https://huggingface.co/somebody/mine"
    assert "local-dir:FOLDER" in str(error.fix)
    assert error_of("hf-hup:timm/x").what == "there is no place 'hf-hup' for a model; did you mean 'hf-hub'?"
    assert error_of("timm/test_resnet").what == (
        "timm has no model 'timm/test_resnet'; a model of the hub is hf-hub:timm/test_resnet"
    )


def test_an_unknown_tag_names_the_nearest() -> None:
    error = error_of("efficientnet_b0.ra_in1", 64)
    assert error.what == ("timm has no weights 'ra_in1' of efficientnet_b0; did you mean 'efficientnet_b0.ra_in1k'?")
    assert (error.where, "leave the tag out" in str(error.fix)) == ("student.model", True)
    assert build("test_resnet.r160_in1k").preprocessing.crop == 1.0


def test_a_model_without_pretrained_weights_says_so() -> None:
    assert (
        "No pretrained weights exist for efficientnet_b6" in error_of("efficientnet_b6", 64, initial="pretrained").what
    )


def test_pretrained_weights_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    error = error_of("repvit_m1_1", 64, initial="pretrained")
    assert error.what.startswith(
        "the pretrained weights of repvit_m1_1 could not be fetched (LocalEntryNotFoundError: "
    )
    assert error.where == "https://huggingface.co/timm/repvit_m1_1.dist_300e_in1k"
    assert error.fix == (
        "download model.safetensors from there and name it as student.initial, or start from initial: random"
    )


def test_an_unknown_model_names_the_nearest() -> None:
    error = error_of("repvit_m11", 64)
    assert error.what == "timm has no model 'repvit_m11'; did you mean 'repvit_m1_1'?"
    assert error.where == "student.model"


def test_a_size_that_a_model_cannot_take() -> None:
    error = error_of("vit_tiny_patch16_224", 64)
    assert error.what == (
        "vit_tiny_patch16_224 cannot be a student at 64 px: Input height (64) doesn't match model (224)."
    )
    assert error.fix == "choose another image_size, or a model of the RepViT or EfficientNet family"


def test_two_heads_cannot_be_a_student() -> None:
    assert error_of("deit_tiny_distilled_patch16_224", 224).what == (
        "deit_tiny_distilled_patch16_224 cannot be a student at 224 px: "
        "its logits are not one head on its pooled features"
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    recipe = validate(
        {
            "data": {"images": "photos", "classes": ["cat", "dog", "owl"]},
            "teacher": {"model": "demo:digits"},
            "student": {"model": "test_resnet", "image_size": 48},
            "objective": {"name": "ce"},
        },
        where="test",
    ).resolved()
    made = start_run(tmp_path / "run", recipe)
    teacher = {"model": "demo:digits", "weights": None, "fingerprint": "", "targets": [], "logit_scale": 100.0}
    made.update_card(teacher={**teacher, "width": WIDTH}, student=build(classes=3).facts(recipe.student))
    return made


def test_weights_come_back_bit_for_bit(run: Run) -> None:
    student = build(classes=3)
    student.model.bn1.running_mean.fill_(0.25)
    save_tensors(run.weights, student.state_dict(), {"epoch": 3, "agreement": 61.5, "held_out_kl": 0.25})
    loaded = load_student(run)
    assert not loaded.training
    assert student_facts(run.weights).model_dump() == {"epoch": 3, "agreement": 61.5, "held_out_kl": 0.25}
    assert loaded.preprocessing == student.preprocessing
    assert loaded.state_dict().keys() == student.state_dict().keys() == load_file(run.weights).keys()
    for name, tensor in student.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_run_without_a_student_says_how_to_go_on(run: Run) -> None:
    with pytest.raises(StudentError) as caught:
        load_student(run)
    assert caught.value.what == "the run has no student yet"
    assert caught.value.fix == f"prgkit distill {run.folder}/recipe.yaml --run {run.folder} goes on with it"


@pytest.mark.parametrize("damage", ["truncated", "another student"])
def test_damaged_weights_are_named(run: Run, damage: str) -> None:
    save_tensors(run.weights, build(classes=3 if damage == "truncated" else 4).state_dict(), {})
    if damage == "truncated":
        run.weights.write_bytes(run.weights.read_bytes()[:-4])
    with pytest.raises(StudentError) as caught:
        load_student(run)
    assert caught.value.what.startswith("the student's weights are damaged: ")
    assert caught.value.where == run.weights
    again = f"prgkit distill {run.folder}/recipe.yaml --run {run.folder}"
    assert caught.value.fix == f"delete it, and {again} brings a student back from the run's checkpoint"
