"""The student: any timm model with one head and a projector that stays at home, and short errors for what cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from prgkit.checkpoint import save_tensors
from prgkit.errors import StudentError
from prgkit.recipe import StudentPage, validate
from prgkit.run import Run, start_run
from prgkit.student import build_student, load_student, reparameterised, student_facts, student_preprocessing

CLASSES, WIDTH = 7, 12
MODELS = [
    ("repvit_m0_9", 64),
    ("efficientnet_b0", 64),
    ("test_resnet", 48),
    ("mobilenetv3_small_050", 64),
    ("test_vit", 160),
    ("test_convnext", 32),
]


def page(model: str = "test_resnet", image_size: int = 48, **facts: Any) -> StudentPage:
    return StudentPage(model=model, image_size=image_size, **facts)


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
        deployed = student.deployed()(pixels(3, size))
    assert side.features.shape == (3, WIDTH)
    assert side.logits.shape == (3, CLASSES)
    torch.testing.assert_close(deployed, side.logits, atol=1e-5, rtol=1e-5)
    assert side.logits.std() > 0
    assert not torch.allclose(side.features[0], side.features[1])


def test_a_deployed_student_has_no_projector_and_is_a_copy() -> None:
    student = build()
    deployed = student.deployed()
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


def test_facts_count_what_is_deployed() -> None:
    student = build()
    facts = student.facts(page())
    assert facts["parameters"] == sum(tensor.numel() for tensor in student.deployed().parameters())
    assert facts["parameters"] < sum(tensor.numel() for tensor in student.parameters())
    assert (facts["model"], facts["initial"]) == ("test_resnet", "random")
    assert facts["preprocessing"] == student.preprocessing.to_dict()


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
        "  fix: write random, pretrained, or the path of a .safetensors file"
    )
    (tmp_path / "model.pt").touch()
    assert error_of(initial=str(tmp_path / "model.pt")).fix == error.fix


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
    made.update_card(teacher={"width": WIDTH}, student=build(classes=3).facts(recipe.student))
    return made


def test_weights_come_back_bit_for_bit(run: Run) -> None:
    student = build(classes=3)
    student.model.bn1.running_mean.fill_(0.25)
    save_tensors(run.weights, student.state_dict(), {"epoch": 3, "agreement": 61.5})
    loaded = load_student(run)
    assert not loaded.training
    assert student_facts(run.weights) == {"epoch": 3, "agreement": 61.5}
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
