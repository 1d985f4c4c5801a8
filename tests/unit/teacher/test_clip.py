"""The teacher: open_clip's own numbers behind two methods, for CLIP and SigLIP, and short errors for what is missing."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from prgkit.config.prompts import named_classes, named_templates
from prgkit.config.sections import TeacherConfig, Views
from prgkit.errors import TeacherError
from prgkit.teacher.clip import Teacher, load_teacher
from prgkit.teacher.feature_store import existing_store, open_store
from prgkit.teacher.weights import check_teacher, settled, teacher_identity

CPU = torch.device("cpu")
SIZE, WIDTH = 32, 24
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
VISION = {"image_size": SIZE, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
CLIP = {
    "model_cfg": {"embed_dim": WIDTH, "vision_cfg": VISION, "text_cfg": TEXT},
    "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28], "resize_mode": "shortest"},
}
SIGLIP = {
    "model_cfg": {
        "embed_dim": WIDTH,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": VISION,
        "text_cfg": TEXT,
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize_mode": "squash"},
}
PAGES = {"clip": CLIP, "siglip": SIGLIP}
LAST = {**TEXT, "pool_type": "last", "no_causal_mask": True, "proj_bias": True}  # as SigLIP's own text tower pools
READERS = {
    **PAGES,
    "last": {**SIGLIP, "model_cfg": {**SIGLIP["model_cfg"], "text_cfg": LAST}},  # type: ignore[dict-item]
    "eos": {**CLIP, "model_cfg": {**CLIP["model_cfg"], "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 49407}}},  # type: ignore[dict-item]
}


def pictures(count: int, *, size: int = SIZE, seed: int = 0) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Smooth shapes with some noise, as photographs are: [count, size, size, 3]."""
    generator = np.random.default_rng(seed)
    coarse = [Image.fromarray(grid) for grid in generator.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)]
    smooth = np.stack([image.resize((size, size), Image.Resampling.BICUBIC) for image in coarse])
    return (smooth + generator.normal(0, 5, smooth.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny CLIPs and SigLIPs with random weights, in open_clip's own format."""
    made = {}
    for name, page in READERS.items():
        folder = made[name] = tmp_path_factory.mktemp(name)
        (folder / "open_clip_config.json").write_text(json.dumps(page))
        torch.manual_seed(1)
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()},
                  folder / "open_clip_model.safetensors")  # fmt: skip
    return made


@pytest.fixture(scope="module", params=PAGES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def teacher(folders: dict[str, Path], family: str) -> Teacher:
    return load_teacher(local(folders[family]), CPU)


@pytest.fixture(scope="module")
def theirs(folders: dict[str, Path], family: str) -> tuple[Any, Any]:
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folders[family]}")
    return model.eval(), transform


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing in the cache and no network: the hub fails at once."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def local(folder: Path, **facts: Any) -> TeacherConfig:
    return TeacherConfig(model=f"local-dir:{folder}", batch_size=4, **facts)


def error_of(model: str, weights: str | None = None) -> TeacherError:
    with pytest.raises(TeacherError) as caught:
        load_teacher(TeacherConfig(model=model, weights=weights), CPU)
    return caught.value


def test_images_become_unit_vectors(teacher: Teacher) -> None:
    features = teacher.embed_images(torch.from_numpy(pictures(5)))
    assert features.shape == (5, WIDTH)
    assert teacher.width == WIDTH
    assert features.dtype == torch.float32
    torch.testing.assert_close(features.norm(dim=1), torch.ones(5))


def test_image_features_are_open_clips_own(teacher: Teacher, theirs: tuple[Any, Any]) -> None:
    pixels, (model, _) = torch.from_numpy(pictures(6)), theirs
    config = open_clip.get_model_preprocess_cfg(model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with torch.no_grad():
        expected = model.encode_image((pixels.permute(0, 3, 1, 2) / 255 - mean) / std, normalize=True)
    torch.testing.assert_close(teacher.embed_images(pixels), expected, atol=1e-6, rtol=1e-5)


def test_each_template_has_its_own_embedding(teacher: Teacher, theirs: tuple[Any, Any], folders: Any) -> None:
    prompts = [["a photo of a cat", "a photo of a dog", "a photo of an owl"], ["cat", "dog", "owl"]]
    embedded = teacher.embed_prompts(prompts)
    assert embedded.shape == (2, 3, WIDTH)
    tokenizer = open_clip.get_tokenizer("ViT-B-32", context_length=TEXT["context_length"])
    for template, of_template in zip(embedded, prompts, strict=True):
        with torch.no_grad():
            expected = theirs[0].encode_text(tokenizer(of_template), normalize=True)
        torch.testing.assert_close(template, expected, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(embedded[0], embedded[1], atol=1e-3)


def test_more_prompts_than_a_chunk_keep_their_order(teacher: Teacher) -> None:
    names = [f"thing {number}" for number in range(300)]
    embedded = teacher.embed_prompts([names])[0]
    torch.testing.assert_close(embedded[[3, 299]], teacher.embed_prompts([["thing 3", "thing 299"]])[0])


NAMES = ["cat", "red panda", "kuehneromyces mutabilis", *(f"thing {number}" for number in range(130))]


@pytest.mark.parametrize("name", READERS)
def test_a_context_of_the_words_own_embeddings_reads_like_the_words(folders: dict[str, Path], name: str) -> None:
    teacher, words = load_teacher(local(folders[name]), CPU), "a photo of a"
    texts = [f"{words} {thing}." for thing in NAMES]
    sentences = teacher.sentences(texts, words)
    vectors = teacher.embed_words(sentences)
    assert vectors.shape == (4, TEXT["width"])
    with torch.no_grad():
        expected = teacher.model.encode_text(teacher.tokenizer(texts), normalize=True)
    torch.testing.assert_close(teacher.embed_with_context([texts], words, vectors)[0], expected, atol=1e-5, rtol=0)
    moved = teacher.embed_with_context([texts], words, vectors.flip(1))[0]
    assert not torch.allclose(moved, expected, atol=1e-3)
    # The names come after the context, whatever words it stands for.
    other = [f"one two three four {thing}." for thing in NAMES]
    torch.testing.assert_close(
        teacher.embed_with_context([other], "one two three four", vectors.flip(1))[0], moved, atol=1e-5, rtol=0
    )
    torch.testing.assert_close(teacher.embed_prompts([texts])[0], expected, atol=1e-5, rtol=0)  # nothing is left behind


def test_a_contexts_gradient_is_the_same_in_chunks(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, gradients = load_teacher(local(folders["clip"]), CPU), []
    sentences = teacher.sentences([f"a photo of a {thing}." for thing in NAMES[:9]], "a photo of a")
    for chunk in (128, 4):
        monkeypatch.setattr("prgkit.teacher.clip.TEXTS_AT_ONCE", chunk)
        vectors = teacher.embed_words(sentences).clone().requires_grad_()
        (teacher.embed_sentences(sentences, vectors)[:, 0] * torch.arange(9)).sum().backward()
        gradients.append(vectors.grad)
    assert gradients[0] is not None
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_name_that_leaves_the_context_no_room_is_named(teacher: Teacher) -> None:
    fits = "a photo of a " + "very " * 9 + "cat"  # with both ends 16 tokens
    teacher.sentences([fits, "a photo of a cat"], "a photo of a")
    with pytest.raises(TeacherError, match=r"'a photo of a very .* cat\.' is longer than the 16 tokens"):
        teacher.sentences(["a photo of a cat", f"{fits}."], "a photo of a")


LONG = "a photo of a" + " very" * 9


def test_two_names_that_differ_behind_the_last_token_are_refused(teacher: Teacher) -> None:
    prompts = [[f"{LONG} long cat name", "a photo of a dog", f"{LONG} long cat other"]]
    names = ["very very very cat name", "dog", "very very very cat other"]
    with pytest.raises(TeacherError, match="as one and the same: it reads 16 tokens, and not") as caught:
        teacher.check_prompts(prompts, names)
    assert "'very very very cat name' and 'very very very cat other'" in caught.value.what
    assert (caught.value.where, "shorten these names" in str(caught.value.fix)) == ("data.classes", True)
    # Another template that leaves them room tells them apart.
    assert "2 class names are longer" in teacher.check_prompts([*prompts, ["cat name", "dog", "cat other"]], names)


def test_two_names_of_the_same_tokens_are_refused(teacher: Teacher) -> None:
    with pytest.raises(TeacherError, match="reads 'AT&amp;T' and 'AT&T' as one and the same\n") as caught:
        teacher.check_prompts([["AT&amp;T", "dog", "AT&T"]], ["AT&amp;T", "dog", "AT&T"])
    assert "more than case" in str(caught.value.fix)


def test_a_name_that_is_cut_is_said_with_its_end(teacher: Teacher) -> None:
    said = teacher.check_prompts([["a photo of a cat", f"{LONG} cat and dog"]], ["cat", "very cat and dog"])
    assert said == (
        "a class name is longer than the 16 tokens that the teacher reads: "
        "it does not read 'and dog' of 'very cat and dog'"
    )
    assert (
        teacher.check_prompts([["a photo of a cat", f"{LONG} cat."]], ["cat", "very cat"]) == ""
    )  # a template's own end


class Padded:
    """Tokenizers as Hugging Face has them: one token a word, and ``end`` and ``pad`` as the models differ in them."""

    def __init__(self, length: int, *, end: int, pad: int, left: bool = False, last: int | None = None) -> None:
        self.length, self.end, self.pad, self.left, self.last = length, end, pad, left, last

    def __call__(self, texts: list[str], context_length: int | None = None) -> torch.Tensor:
        length = (context_length or self.length) - (self.last is not None)
        rows = []
        for text in texts:
            words = [*[10 + sum(word.encode()) for word in text.split()][: length - 1], self.end]
            padding = [self.pad] * (length - len(words))
            row = padding + words if self.left else words + padding
            rows.append(row if self.last is None else [*row, self.last])
        return torch.tensor(rows)


@pytest.mark.parametrize(
    "tokenizer",
    [
        Padded(6, end=2, pad=0),
        Padded(6, end=1, pad=1),  # SigLIP's
        Padded(6, end=2, pad=0, left=True),
        Padded(7, end=2, pad=0, last=101),  # open_clip's "clips" mode
    ],
)
def test_tokenizers_of_every_padding(teacher: Teacher, monkeypatch: pytest.MonkeyPatch, tokenizer: Padded) -> None:
    monkeypatch.setattr(teacher, "tokenizer", tokenizer)
    five, six = "one two three four five", "one two three four five six"
    assert teacher.check_prompts([[five, "cat"]], [five, "cat"]) == ""
    assert "it does not read 'six' of" in teacher.check_prompts([[six, "cat"]], [six, "cat"])
    with pytest.raises(TeacherError, match=f"it reads {tokenizer.length} tokens, and not 'six'"):
        teacher.check_prompts([[six, "cat", five]], [six, "cat", five])


def test_a_text_tower_of_another_kind_takes_no_context(teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = teacher.sentences(["a cat"], "a")
    monkeypatch.setattr(teacher, "model", torch.nn.Module())
    with pytest.raises(TeacherError, match="takes no learned context"):
        teacher.embed_words(sentences)


def test_the_logit_bias_stays_out(folders: dict[str, Path]) -> None:
    teacher = load_teacher(local(folders["siglip"]), CPU)
    model = open_clip.create_model(f"local-dir:{folders['siglip']}").eval()
    assert model.logit_bias.item() == -10
    assert teacher.logit_scale == pytest.approx(model.logit_scale.exp().item())
    pixels, prompts = torch.from_numpy(pictures(6)), [["cat", "dog", "owl"]]
    logits = teacher.logit_scale * teacher.embed_images(pixels) @ teacher.embed_prompts(prompts)[0].T
    images = (pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    with torch.no_grad():
        theirs, _ = model.get_logits(images, open_clip.get_tokenizer("ViT-B-32", context_length=16)(prompts[0]))
    torch.testing.assert_close(logits - 10, theirs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits.softmax(1), theirs.softmax(1), atol=1e-5, rtol=1e-4)
    assert logits.argmax(1).equal(theirs.argmax(1))


@pytest.mark.parametrize("size", [(61, 37), (37, 61), (200, 33), (32, 32), (40, 40), (31, 77), (7, 9)])
def test_preprocessing_is_open_clips_own(teacher: Teacher, theirs: tuple[Any, Any], size: tuple[int, int]) -> None:
    image = Image.fromarray(pictures(1, size=200, seed=5)[0]).resize(size)
    model, transform = theirs
    config = open_clip.get_model_preprocess_cfg(model)
    mean, std = (np.array(config[name]) for name in ("mean", "std"))
    expected = (transform(image).permute(1, 2, 0).numpy() * std + mean) * 255
    prepared = teacher.preprocessing.prepare(image)
    assert prepared.shape == (SIZE, SIZE, 3)
    assert np.abs(prepared - expected).max() <= 1.01
    assert np.abs(prepared - expected).mean() < 0.05


@pytest.mark.parametrize("family", PAGES)
@pytest.mark.parametrize("stated", ["bicubic", "bilinear", "random"])
def test_a_teacher_that_is_not_square_sees_what_open_clip_shows_it(tmp_path: Path, family: str, stated: str) -> None:
    page: Any = json.loads(json.dumps(PAGES[family]))
    page["model_cfg"]["vision_cfg"]["image_size"] = [48, 24]
    page["preprocess_cfg"] |= {"interpolation": stated, "mean": 0.5}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(page))
    model = open_clip.create_model(f"local-dir:{tmp_path}", load_weights=False)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "model.safetensors"
    )
    teacher = load_teacher(local(tmp_path), CPU)
    theirs, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tmp_path}")
    assert teacher.shape == (48, 24, 3)
    for size in ((61, 37), (37, 61), (200, 33), (24, 48), (300, 301)):
        image = Image.fromarray(pictures(1, size=200, seed=5)[0]).resize(size)
        with torch.no_grad():
            expected = theirs.eval().encode_image(transform(image)[None], normalize=True)
        seen = teacher.embed_images(torch.from_numpy(teacher.preprocessing.prepare(image))[None])
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-4)


def test_families_prepare_differently(folders: dict[str, Path]) -> None:
    assert not load_teacher(local(folders["clip"]), CPU).preprocessing.squash
    assert load_teacher(local(folders["siglip"]), CPU).preprocessing.squash


def test_letterboxing_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "teacher"))
    config = {**CLIP, "preprocess_cfg": {**CLIP["preprocess_cfg"], "resize_mode": "longest"}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert "letterboxes its images (resize_mode longest)" in error_of(f"local-dir:{folder}").what


def test_features_do_not_depend_on_the_rest_of_a_batch(teacher: Teacher) -> None:
    pixels = torch.from_numpy(pictures(8))
    alone = teacher.embed_images(pixels[:1].expand(8, -1, -1, -1))
    assert torch.equal(teacher.embed_images(pixels)[0], alone[0])


def test_bf16_is_near_and_not_equal(folders: dict[str, Path]) -> None:
    pixels = torch.from_numpy(pictures(4))
    full = load_teacher(local(folders["clip"]), CPU).embed_images(pixels)
    half = load_teacher(local(folders["clip"], precision="bf16"), CPU).embed_images(pixels)
    assert 1e-5 < (full - half).abs().max() < 0.03


def test_a_teacher_is_frozen(teacher: Teacher) -> None:
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert not teacher.model.training


def test_identity_follows_content_not_place(folders: dict[str, Path], tmp_path: Path) -> None:
    before = teacher_identity(local(folders["clip"]))
    moved = Path(shutil.copytree(folders["clip"], tmp_path / "moved"))
    (moved / "README.md").write_text("notes do not count")
    assert teacher_identity(local(moved)) == before
    assert teacher_identity(local(moved, precision="bf16")) != before
    weights = moved / "open_clip_model.safetensors"
    tensors = load_file(weights)
    tensors["logit_scale"] += 1e-3
    save_file(tensors, weights)
    assert teacher_identity(local(moved)) != before


@pytest.mark.parametrize(("weights", "activation"), [("openai", "QuickGELU"), ("laion2b_s34b_b79k", "GELU")])
def test_weights_get_the_activation_they_were_trained_with(
    monkeypatch: pytest.MonkeyPatch, weights: str, activation: str
) -> None:
    def zeros(model: torch.nn.Module, *_: Any, **__: Any) -> None:
        for tensor in model.state_dict().values():
            tensor.zero_()

    for module in (open_clip.factory, open_clip.pretrained):
        monkeypatch.setattr(module, "download_pretrained", lambda *_, **__: "nothing.safetensors")
    monkeypatch.setattr(open_clip, "load_checkpoint", zeros)
    teacher = load_teacher(TeacherConfig(model="ViT-B-32", weights=weights), torch.device("cpu"))
    assert type(teacher.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == activation


def test_a_file_of_weights_is_refused_since_its_configuration_is_lost(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").write_bytes(b"weights")
    error = error_of("ViT-B-32", str(tmp_path / "mine.safetensors"))
    assert "has no weights" in error.what
    assert "local-dir:FOLDER" in str(error.fix)


def test_an_unknown_model_names_the_nearest() -> None:
    error = error_of("ViT-B-23", "openai")
    assert str(error) == (
        "open_clip has no model 'ViT-B-23'; did you mean 'ViT-B-32'?\n  where: teacher.model\n"
        "  fix: choose a name of open_clip.list_models(), hf-hub:OWNER/NAME, or local-dir:PATH"
    )
    assert error_of("hub:laion/CLIP").what == "open_clip has no model 'hub:laion/CLIP'"


def test_an_unknown_tag_names_the_nearest_and_all() -> None:
    error = error_of("RN50", "openia")
    assert error.what == "RN50 has no weights 'openia'; did you mean 'openai'?"
    assert str(error.fix).startswith("choose one of openai, yfcc15m, cc12m, or put a file of your own beside")
    missing = error_of("RN50")
    assert (missing.what, missing.fix) == (
        "teacher.weights is missing for RN50",
        "choose one of openai, yfcc15m, cc12m",
    )


def test_a_folder_without_a_config_says_what_belongs_there(tmp_path: Path) -> None:
    fix = "teacher.model is local-dir:PATH of a folder with that file and open_clip_model.safetensors"
    error = error_of(f"local-dir:{tmp_path}")
    assert (error.what, error.where, error.fix) == (
        "the teacher's folder holds no open_clip_config.json",
        tmp_path,
        fix,
    )
    assert error_of(f"local-dir:{tmp_path / 'no'}").what == "there is no such folder"
    with pytest.raises(TeacherError, match=r"holds no open_clip_config\.json"):
        teacher_identity(local(tmp_path))


@pytest.mark.parametrize("kept", [0, 7, 1000, -100])
def test_truncated_weights_are_an_error(folders: dict[str, Path], tmp_path: Path, kept: int) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "teacher"))
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    error = error_of(f"local-dir:{folder}")
    assert error.what.startswith("the teacher's files cannot be loaded (")
    assert error.where == folder
    assert error.fix == "copy open_clip_config.json and open_clip_model.safetensors again: damaged, or of two models"


def test_weights_of_another_model_are_an_error(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "teacher"))
    shutil.copy(folders["siglip"] / "open_clip_model.safetensors", folder)
    assert error_of(f"local-dir:{folder}").what.startswith("the teacher's files cannot be loaded (")


def emptied(folders: dict[str, Path], tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with the configuration of a teacher alone, and the teacher's weights."""
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "teacher"))
    weights = load_file(folder / "open_clip_model.safetensors")
    (folder / "open_clip_model.safetensors").unlink()
    return folder, weights


def same_as(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> bool:
    state = model.state_dict()
    return state.keys() == weights.keys() and all(torch.equal(state[name], weights[name]) for name in state)


def checkpoint(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What open_clip's training saves, of several processes."""
    state = {f"module.{name}": tensor for name, tensor in weights.items()}
    return {"epoch": 3, "name": "mine", "state_dict": state, "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}}


@pytest.mark.parametrize(
    "name", ["open_clip_pytorch_model.bin", "model.pth", "anything.safetensors", "weights.bin", "mine.pt", "epoch_3.pt"]
)
def test_the_only_file_of_weights_is_the_teachers(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder, weights = emptied(folders, tmp_path)
    if name.endswith(".safetensors"):
        save_file(weights, folder / name)
    else:
        torch.save(checkpoint(weights) if name.startswith("epoch") else weights, folder / name)
    assert same_as(load_teacher(local(folder), CPU).model, weights)
    assert sorted(teacher_identity(local(folder))["files"]) == sorted([name, "open_clip_config.json"])


def test_a_checkpoint_beside_the_weights_is_left_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "teacher"))
    (folder / "epoch_3.pt").write_bytes(b"never read")
    (folder / "results.jsonl").write_text("{}\n")
    assert same_as(load_teacher(local(folder), CPU).model, load_file(folder / "open_clip_model.safetensors"))
    assert teacher_identity(local(folder)) == teacher_identity(local(folders["clip"]))
    notes: list[str] = []
    check_teacher(local(folder), note=notes.append)
    check_teacher(local(folders["clip"]), note=notes.append)
    assert notes == [
        f"the teacher is open_clip_model.safetensors of {folder}, and not epoch_3.pt beside it: "
        "teacher.weights names another"
    ]


def test_a_mean_of_0_to_255_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "teacher"))
    page = json.loads((folder / "open_clip_config.json").read_text())
    page["preprocess_cfg"] = {**page.get("preprocess_cfg", {}), "mean": [123.675, 116.28, 103.53]}
    (folder / "open_clip_config.json").write_text(json.dumps(page))
    with pytest.raises(
        TeacherError, match=r"a mean or std of \[123.675, 116.28, 103.53\], and pictures go from 0 to 1"
    ):
        load_teacher(local(folder), CPU)


def test_a_tensor_that_the_model_has_no_place_for_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "teacher"))
    weights = load_file(folder / "open_clip_model.safetensors")
    save_file({**weights, "logit_bias": torch.tensor(-10.0)}, folder / "open_clip_model.safetensors")
    with pytest.raises(TeacherError, match=r"the model has no place for 1 of its tensors, e\.g\. logit_bias"):
        load_teacher(local(folder), CPU)


def test_one_of_several_files_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    folder, weights = emptied(folders, tmp_path)
    torch.save(checkpoint({name: tensor + 1 for name, tensor in weights.items()}), folder / "epoch_3.pt")
    torch.save(checkpoint(weights), folder / "epoch_4.pt")
    error = error_of(f"local-dir:{folder}")
    assert error.what == "the teacher's folder holds 2 files that may be its weights: epoch_3.pt, epoch_4.pt"
    assert error.fix == f"name one: teacher: {{model: 'local-dir:{folder}', weights: epoch_4.pt}}"
    assert error_of(f"local-dir:{folder}", "openai").what == error.what  # a tag, left from a named model
    assert same_as(load_teacher(local(folder, weights="epoch_4.pt"), CPU).model, weights)
    three, four = (teacher_identity(local(folder, weights=f"epoch_{epoch}.pt")) for epoch in (3, 4))
    assert list(three["files"]) == ["epoch_3.pt", "open_clip_config.json"]
    assert three != four
    error = error_of(f"local-dir:{folder}", "epoch_5.pt")
    assert error.what == "the teacher's folder holds no weights epoch_5.pt; did you mean 'epoch_4.pt'?"
    assert error.where == folder


def test_a_folder_without_weights_is_refused_before_anything_is_loaded(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    folder, _ = emptied(folders, tmp_path)
    with pytest.raises(TeacherError, match="holds a configuration and no weights") as caught:
        check_teacher(local(folder))
    assert caught.value.where == folder
    assert "checkpoint of open_clip's training (.safetensors, .bin, .pt, .pth, .ckpt)" in str(caught.value.fix)


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda weights: {}, "it holds no tensors"),
        (lambda weights: {"epoch": 3, "state_dict": {}}, "it holds no tensors"),
        (lambda weights: [1, 2], "it holds no state dict of tensors by name"),
        (lambda weights: {"epoch": 3, "optimizer": {}}, "it holds no state dict of tensors by name|Missing key"),
        (lambda weights: {k: v for k, v in weights.items() if k != "visual.proj"}, "Missing key.*visual.proj"),
        (lambda weights: checkpoint(dict(list(weights.items())[:9])), "Missing key"),
        (lambda weights: {**weights, "visual.proj": torch.ones(3, 3)}, "size mismatch for visual.proj.*3, 3"),
        (lambda weights: {**weights, "stranger": torch.ones(3)}, 'Unexpected key.*"stranger"'),
        (
            lambda weights: {**weights, "visual.proj": weights["visual.proj"] * torch.nan},
            "no numbers, e.g. visual.proj",
        ),
    ],
)
def test_a_file_that_is_not_all_of_the_model_is_refused(
    folders: dict[str, Path], tmp_path: Path, damage: Callable[[Any], Any], told: str
) -> None:
    folder, weights = emptied(folders, tmp_path)
    torch.save(damage(weights), folder / "epoch_3.pt")
    error = error_of(f"local-dir:{folder}")
    assert re.search(told, error.what), error.what
    assert error.what.startswith("the teacher's files cannot be loaded (epoch_3.pt: ")
    assert error.where == folder


def test_open_clip_that_loads_less_than_all_is_found_out(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip, "load_checkpoint", lambda *_, **__: {})
    assert "of its tensors are missing" in error_of(f"local-dir:{folders['clip']}").what


def cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, repository: str, files: Sequence[Path]) -> None:
    """Put a repository into the hub's cache, and take the network away."""
    snapshot = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (snapshot / "snapshots" / "abc").mkdir(parents=True)
    (snapshot / "refs").mkdir()
    (snapshot / "refs" / "main").write_text("abc")
    for path in files:
        shutil.copy(path, snapshot / "snapshots" / "abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def test_a_hub_model_has_its_weights_or_is_refused(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, weights = folders["clip"] / "open_clip_config.json", folders["clip"] / "open_clip_model.safetensors"
    cached(monkeypatch, tmp_path / "whole", "somebody/whole", [config, weights])
    assert same_as(load_teacher(TeacherConfig(model="hf-hub:somebody/whole"), CPU).model, load_file(weights))
    cached(monkeypatch, tmp_path / "part", "somebody/part", [config])
    error = error_of("hf-hub:somebody/part")
    assert error.what.startswith("open_clip_model.safetensors of hf-hub:somebody/part could not be fetched (")


class Evil:
    """A pickle that makes a file when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin", "epoch_3.pt"])
def test_a_pickle_is_never_run(folders: dict[str, Path], tmp_path: Path, name: str) -> None:
    folder = Path(shutil.copytree(folders["clip"], tmp_path / "teacher"))
    (folder / "open_clip_model.safetensors").unlink()
    loot = tmp_path / "owned"
    (folder / name).write_bytes(pickle.dumps({"logit_scale": Evil(loot)}))
    assert error_of(f"local-dir:{folder}").what.startswith("the teacher's files cannot be loaded (")
    torch.save({"logit_scale": Evil(loot)}, folder / name)
    assert error_of(f"local-dir:{folder}").what.startswith("the teacher's files cannot be loaded (")
    assert "weights_only" not in error_of(f"local-dir:{folder}").what  # PyTorch's advice to run it after all
    assert not loot.exists()
    torch.load(io.BytesIO((folder / name).read_bytes()), weights_only=False)
    assert loot.exists()  # it would have


@pytest.mark.usefixtures("offline")
def test_weights_that_cannot_be_fetched(capfd: pytest.CaptureFixture[str]) -> None:
    error = error_of("RN50", "openai")
    assert error.what.startswith("open_clip_model.safetensors of RN50 could not be fetched (RuntimeError: ")
    assert error.where == "https://huggingface.co/timm/resnet50_clip.openai"
    assert error.fix == (
        "download it and open_clip_config.json from there into a folder, and name that: "
        "teacher: {model: 'local-dir:FOLDER'}"
    )
    assert capfd.readouterr() == ("", "")


@pytest.mark.usefixtures("offline")
def test_a_hub_model_that_cannot_be_fetched() -> None:
    error = error_of("hf-hub:somebody/something")
    assert error.what.startswith("open_clip_model.safetensors of hf-hub:somebody/something could not be fetched (")
    assert error.where == "https://huggingface.co/somebody/something"


def test_imagenets_words_are_open_clips() -> None:
    classes, templates = named_classes("imagenet1k"), named_templates("imagenet")
    assert (len(classes), len(set(classes)), len(templates)) == (1000, 1000, 80)
    assert classes[:2] == ("tench", "goldfish")
    assert templates[0] == "a bad photo of a {}."
    assert all(template.count("{}") == 1 for template in templates)


def test_what_a_teacher_leaves_open_is_chosen_by_the_device_and_by_the_store_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_open, loads = TeacherConfig(model="demo:digits"), 0
    assert settled(left_open, "bf16", 8) == TeacherConfig(model="demo:digits", precision="bf16", batch_size=8)

    def load(config: TeacherConfig) -> Teacher:
        nonlocal loads
        loads += 1
        return load_teacher(config, torch.device("cpu"))

    first = open_store(left_open, Views(), tmp_path, load)
    assert (first.config.precision, first.config.batch_size) == ("fp32", 64)
    assert first.card.teacher["precision"] == "fp32"
    bf16 = open_store(settled(left_open, "bf16", 32), Views(), tmp_path, load)
    assert bf16.folder != first.folder
    assert existing_store(left_open, Views(), tmp_path).folder == first.folder  # type: ignore[union-attr]
    assert existing_store(left_open, Views(seed=1), tmp_path) is None
    monkeypatch.setattr("prgkit.teacher.weights.teacher_precision", lambda _: "bf16")
    found = existing_store(left_open, Views(), tmp_path)
    assert found is not None
    assert (found.folder, found.config.batch_size) == (bf16.folder, 32)
    assert loads == 2


def test_the_batch_that_fits_a_gpu_is_found_by_trying() -> None:
    class Small:
        device, shape = torch.device("cuda"), (2, 2, 3)
        tried: ClassVar[list[int]] = []

        def embed_images(self, pixels: torch.Tensor) -> None:
            self.tried.append(len(pixels))
            if len(pixels) > 300:
                raise torch.OutOfMemoryError

    assert Teacher._fitting_batch_size(Small()) == 128  # type: ignore[arg-type]
    assert Small.tried == [1024, 512, 256]
