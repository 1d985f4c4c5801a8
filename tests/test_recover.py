"""Recovery: fake quantisation is what ONNX Runtime computes, a fine-tune with it brings answers back, without a label."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")

from torch import nn  # noqa: E402

from prgkit.errors import ExportError, ImagesError, TargetsError  # noqa: E402
from prgkit.export import recover as recovery  # noqa: E402
from prgkit.export.fidelity import hold_floor, logits_of  # noqa: E402
from prgkit.export.floor import apart, outcome, told, within_reach  # noqa: E402
from prgkit.export.onnx import deployable, export_onnx  # noqa: E402
from prgkit.export.pipeline import ExportOptions, HeldOut, export_student  # noqa: E402
from prgkit.export.quantize import find_blocks, tensors_of, write_int8  # noqa: E402
from prgkit.export.ranges import measure_spreads  # noqa: E402
from prgkit.export.recover import (  # noqa: E402
    Learned,
    RoundedWeight,
    fake_quantise,
    folded,
    recover,
    require_same,
    rounded,
    steps_for,
)
from prgkit.export.run import evaluation_positions, learned_images  # noqa: E402
from prgkit.files import sha256, write_sealed  # noqa: E402
from prgkit.images import Preprocessing  # noqa: E402
from prgkit.lesson import hold_out, read_catalogue  # noqa: E402
from prgkit.recipe import load_recipe  # noqa: E402
from prgkit.run import Run  # noqa: E402
from prgkit.watch import Unwatched  # noqa: E402

SIZE, CLASSES, TAIL = 16, tuple(f"thing {number}" for number in range(10)), 0.97
PREPROCESSING = Preprocessing(image_size=SIZE, crop=1.0, interpolation="bicubic", mean=(0.5,) * 3, std=(0.25,) * 3)


class Block(nn.Module):
    """A convolution, its batch norm and its activation."""

    def __init__(self, taken, given, kernel, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(taken, given, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(given)

    def forward(self, images):
        return nn.functional.silu(self.norm(self.conv(images)))


class Tiny(nn.Module):
    """A student whose channels differ in range, so that one scale for a whole tensor is too coarse for many of them."""

    def __init__(self):
        super().__init__()
        blocks = [Block(3, 32, 3, 2), Block(32, 48, 3), Block(48, 48, 1), Block(48, 64, 1)]
        self.model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, len(CLASSES)))
        self.register_buffer("mean", torch.full((3, 1, 1), 127.5))
        self.register_buffer("std", torch.full((3, 1, 1), 63.75))
        with torch.no_grad():
            for block in blocks[:3]:
                block.norm.weight.copy_(torch.exp2(torch.randn(block.norm.weight.shape)))

    def forward(self, pixels):
        return self.model((pixels.float().permute(0, 3, 1, 2) - self.mean) / self.std)


def pictures(count):
    """Coarse patterns with some noise: [count, 16, 16, 3]."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (count, 4, 4, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return (coarse + generator.normal(0, 10, coarse.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The student and its FP32 file, with the ranges of its tensors; it may learn from the first 300 of the pictures."""
    torch.manual_seed(0)
    pixels = pictures(700)
    student = Tiny().train()
    with torch.no_grad():
        for _ in range(50):  # batch norms get to know the pictures
            student(torch.from_numpy(pixels[:256]))
        logits = student.eval()(torch.from_numpy(pixels[:256]))
        head = student.model[-1]
        head.bias.sub_(logits.mean(0)).mul_(3 / logits.std())
        head.weight.mul_(3 / logits.std())
    module = deployable(student, torch.from_numpy(pixels[:64]))
    fp32 = tmp_path_factory.mktemp("tiny") / "model.onnx"
    export_onnx(module, fp32, image_size=SIZE, classes=CLASSES, preprocessing=PREPROCESSING.to_dict(), opset=20)
    blocks = find_blocks(fp32)
    nodes = {node for block in blocks for node in block.nodes}
    spreads = measure_spreads(fp32, tensors_of(fp32, blocks), pixels[:64])
    asked = []
    learned = Learned(300, lambda places: asked.append(places) or pixels[places], "made up")
    return SimpleNamespace(
        student=student, module=module, fp32=fp32, pixels=pixels, learned=learned, asked=asked,
        ranges={"nodes": nodes, "spreads": spreads, "tail": TAIL},
    )  # fmt: skip


def agreement(tiny, source, path):
    """Return the share of the pictures held out on which a file in INT8 has the student's answer."""
    write_int8(source, path, **tiny.ranges, layout="onnxruntime")
    held_out = tiny.pixels[300:]
    return (logits_of(path, held_out).argmax(1) == logits_of(tiny.fp32, held_out).argmax(1)).mean()


def test_rounding_lets_the_gradient_through_where_nothing_is_clipped():
    values = torch.tensor([-3.0, -1.0, 0.3, 126.4, 130.0], requires_grad=True)
    found = rounded(values, (0.5, 2))  # uint8 from -1 to 126.5 in steps of 0.5
    (found * torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])).sum().backward()
    assert found.tolist() == [-1.0, -1.0, 0.5, 126.5, 126.5]
    assert values.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


def test_weights_are_rounded_by_output_channel_and_learn_as_if_they_were_not():
    weight = torch.tensor([[1.27, -0.014], [-254.0, 3.1], [0.0, 0.0]])[:, :, None, None].requires_grad_(True)
    found = RoundedWeight()(weight)
    found.square().sum().backward()
    assert found.flatten().tolist() == pytest.approx([1.27, -0.01, -254.0, 4.0, 0.0, 0.0])
    assert weight.grad.flatten().tolist() == pytest.approx([2.54, -0.02, -508.0, 8.0, 0.0, 0.0])


@pytest.mark.parametrize(("size", "steps"), [(32, 300), (128, 191), (224, 62), (384, 60)])
def test_the_price_is_bounded(size, steps):
    assert steps_for(size) == steps


def test_the_folded_network_gives_the_logits_of_the_file(exported):
    network = folded(exported.module, exported.fp32)
    require_same(network.network, exported.fp32, exported.pixels[:16])
    kinds = [node.op_type for node in onnx.load(str(exported.fp32)).graph.node]
    assert len(network.layers) == kinds.count("Conv") + kinds.count("Gemm")
    next(iter(network.weights.values())).data.mul_(1.1)
    with pytest.raises(ExportError, match="the file's weights do not fit the student's layers"):
        require_same(network.network, exported.fp32, exported.pixels[:16])


def test_fake_quantisation_computes_what_onnx_runtime_does(tiny, tmp_path):
    pupil = folded(tiny.module, tiny.fp32)
    fake_quantise(pupil, tiny.fp32, **tiny.ranges)
    write_int8(tiny.fp32, tmp_path / "int8.onnx", **tiny.ranges, layout="onnxruntime")
    held_out = tiny.pixels[300:]
    with torch.no_grad():
        fake = pupil.network(torch.from_numpy(held_out)).numpy()
    real, plain = logits_of(tmp_path / "int8.onnx", held_out), logits_of(tiny.fp32, held_out)
    assert np.abs(real - plain).mean() > 0.1, "the rounding is coarse"
    assert np.abs(fake - real).mean() < 0.02 * np.abs(real - plain).mean()
    assert (fake.argmax(1) == real.argmax(1)).mean() > 0.99


def test_recovery_brings_answers_back_on_images_it_has_not_seen(tiny, tmp_path):
    before = agreement(tiny, tiny.fp32, tmp_path / "int8.onnx")
    notes, paths = [], [tmp_path / "first.onnx", tmp_path / "second.onnx"]
    tiny.asked.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recovery, "STEPS", (0, 60))
        patch.setattr(recovery, "LEARNING_RATE", 1e-4)
        first, second = (
            recover(tiny.module, tiny.fp32, path, **tiny.ranges, learned=tiny.learned, note=notes.append)
            for path in paths
        )
    assert agreement(tiny, paths[0], tmp_path / "int8.onnx") > before + 0.05
    assert first["kl"][1] < 0.7 * first["kl"][0]
    assert (first["steps"], first["kl"]) == (60, second["kl"])
    assert paths[0].read_bytes() == paths[1].read_bytes(), "a function of its seed"
    assert max(places.max() for places in tiny.asked) < 300
    assert notes[0] == "INT8: the floor is missed; 60 steps of 32 images with fake quantisation may recover it"
    plain, recovered = (onnx.load(str(path)).graph for path in (tiny.fp32, paths[0]))
    assert [node.name for node in plain.node] == [node.name for node in recovered.node]


def export(tiny, folder, notes, learned, *, floor):
    held_out = tiny.pixels[300:]
    teacher = np.zeros((len(held_out), len(CLASSES)), np.float32)
    return export_student(
        tiny.student,
        folder,
        pixels=tiny.pixels[:32],
        golden=[Image.fromarray(pixels) for pixels in tiny.pixels[:2]],
        held_out=HeldOut(iter(held_out), teacher, teacher, None, "made up"),
        classes=CLASSES,
        preprocessing=PREPROCESSING,
        facts={"run": {"name": "test"}, "recipe": {}, "teacher": {"model": "none"}, "student": {"model": "tiny"}},
        options=ExportOptions(int8=True, fidelity=floor),
        learned=lambda: learned,
        note=notes.append,
    )


@pytest.fixture(scope="module")
def coarse():
    """Ranges beyond which nearly every image reaches on either side, and a fine-tune of a few seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prgkit.export.fidelity.TAILS", (TAIL,))
        patch.setattr("prgkit.export.int8.SCAN_TAIL", TAIL)
        patch.setattr(recovery, "STEPS", (0, 80))
        patch.setattr(recovery, "LEARNING_RATE", 1e-4)
        yield


@pytest.fixture(scope="module")
def bundle(tiny, coarse, tmp_path_factory):
    """A bundle whose INT8 file holds its floor only with recovered weights."""
    folder, notes = tmp_path_factory.mktemp("run") / "bundle", []
    manifest = export(tiny, folder, notes, tiny.learned, floor=80)
    return SimpleNamespace(folder=folder, manifest=manifest, notes=notes)


def test_the_manifest_says_what_recovery_did(tiny, bundle):
    found = bundle.manifest["artifacts"][1]["quantization"]
    done = found["recovery"]
    before, after = done["before"], done["after"]
    assert (done["kept"], done["steps"], done["images"], done["seed"]) == (True, 80, 300, 0)
    assert before["learned_with"]["interval"][0] < 80 <= after["learned_with"]["interval"][0]
    assert (found["kept"], found["float_blocks"], found["agreement"]) == (True, [], after["agreement"])
    assert len(before["float_blocks"]) == 1
    said = next(note for note in bundle.notes if note.startswith("model.int8.onnx: 3 of 3 blocks in INT8: the same "))
    assert "; its weights are fine-tuned for INT8, without that 2 could be (with 3 of 3 blocks in INT8 " in said
    held_out, files = tiny.pixels[300:], [bundle.folder / name for name in ("model.onnx", "model.int8.onnx")]
    plain, quantised = (logits_of(path, held_out).argmax(1) for path in files)
    assert 100 * (plain == quantised).mean() == found["agreement"], "the file that is kept is the recovered one"
    assert (plain == logits_of(tiny.fp32, held_out).argmax(1)).all(), "FP32 stays what it was"


def test_what_is_recovered_is_not_recovered_again(tiny, bundle, tmp_path):
    shutil.copytree(bundle.folder, tmp_path / "bundle")
    notes = []
    assert export(tiny, tmp_path / "bundle", notes, tiny.learned, floor=80)["artifacts"] == bundle.manifest["artifacts"]
    assert not any("step" in note for note in notes)


def test_where_recovery_is_not_possible_the_file_without_it_stays(tiny, bundle, tmp_path):
    def read(places):
        if len(places) == recovery.BATCH:
            raise ImagesError("a.png could be read before and no longer can")
        return tiny.pixels[places]

    shutil.copytree(bundle.folder, tmp_path / "bundle")
    notes = []
    manifest = export(tiny, tmp_path / "bundle", notes, Learned(300, read, "gone"), floor=80)
    found = manifest["artifacts"][1]["quantization"]
    assert (found["kept"], len(found["float_blocks"])) == (True, 1)
    assert "recovery" not in found
    assert "INT8: no recovery: a.png could be read before and no longer can" in notes


def found_with(*tried):
    rows = [{"float_blocks": count, "agreement": share, "interval": [share - 1, share + 1]} for count, share in tried]
    last = {**rows[-1], "blocks": 20, "float_blocks": ["a"] * rows[-1]["float_blocks"]}
    return {**last, "floor": 98, "images": 2000, "tail": 1e-3, "kept": rows[-1]["interval"][0] >= 98, "tried": rows}


@pytest.mark.parametrize(
    ("tried", "count"),
    [
        ([(0, 96.0), (5, 99.5)], 0),
        ([(0, 96.0), (2, 99.5)], None),  # nine in ten are in INT8 as it is
        ([(0, 63.0), (10, 96.5), (15, 98.2), (17, 99.2)], 10),  # three times as many disagree as may are too many
        ([(0, 63.0), (10, 95.9), (12, 99.1)], None),
        ([(0, 63.0), (10, 80.0), (19, 97.0)], 19),
    ],
)
def test_recovery_is_made_for_the_blocks_within_its_reach(tried, count):
    assert within_reach(found_with(*tried)) == count


def test_recovery_that_brings_nothing_is_not_kept_and_that_is_said():
    found = found_with((0, 63.0), (10, 96.5), (19, 97.0))
    after = found_with((10, 97.75), (19, 97.0))
    found["recovery"] = {"kept": False, "before": outcome(found, 10), "after": outcome(after, 10)}
    assert told(found) == (
        "INT8 is not kept: with only 1 of 20 blocks in it, the same answer as FP32 on 97.00 % of 2,000 held-out images, "
        "lower 95 % bound 96.00 %; the floor is 98 %; a fine-tune for INT8 brought no more blocks into it "
        "(with 10 of 20 blocks in INT8 96.50 % before, 97.75 % after)"
    )


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("", ""),
        ("a", ", a in float"),
        ("abcd", ", a, b, c, d in float"),
        ("abcdefg", ", a, b, c, d and 3 more in float"),
    ],
)
def test_a_sentence_names_a_few_blocks(names, said):
    assert apart(list(names)) == said


def test_blocks_left_in_float_are_counted_and_stay_there(tiny, tmp_path):
    blocks, path = find_blocks(tiny.fp32), tmp_path / "int8.onnx"
    found = hold_floor(
        tiny.fp32,
        path,
        blocks=blocks[1:],
        scan=[{"block": block.name} for block in blocks[1:]],
        spreads=tiny.ranges["spreads"],
        tail=TAIL,
        layout="onnxruntime",
        pixels=tiny.pixels[300:],
        logits=logits_of(tiny.fp32, tiny.pixels[300:]),
        floor=1,
        left=[blocks[0].name],
        note=lambda text: None,
    )
    assert (found["blocks"], found["float_blocks"]) == (3, [blocks[0].name])
    assert [row["float_blocks"] for row in found["tried"]] == [1]
    weights = {node.name: node.input[1] for node in onnx.load(str(path)).graph.node if node.op_type == "Conv"}
    assert not weights[blocks[0].nodes[0]].endswith("_dequantised")
    assert weights[blocks[1].nodes[0]].endswith("_dequantised")


def test_nothing_that_is_held_out_is_learned_from(tmp_path):
    for number, pixels in enumerate(pictures(60)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    sets = [f"data.images={tmp_path}", "data.classes=[a, b]", "data.held_out=0.3"]
    recipe = load_recipe("custom", overrides=sets)
    images = read_catalogue(recipe.data.images, recipe, Unwatched())
    positions = evaluation_positions(images, recipe)
    run = Run(tmp_path / "run")
    learned = learned_images(run, images, positions[:-1], PREPROCESSING, recipe, (), Unwatched())
    taken = {pixels.tobytes() for pixels in learned.read(np.arange(learned.images))}
    held = {PREPROCESSING.prepare(images.read(place)).tobytes() for place in hold_out(images.keys, 0.3).tolist()}
    assert (len(taken), len(held)) == (60 - len(positions), len(positions))
    assert not taken & held, "neither those that travel nor the others that selected the student"
    run.folder.mkdir()
    np.save(run.confidence_file, np.linspace(0, 1, learned.images, dtype=np.float32))
    write_sealed(run.answers_file, {"confidence_sha256": sha256(run.confidence_file)})
    recipe = load_recipe("custom", overrides=[*sets, "data.keep.min_confidence=0.5"])
    sure = learned_images(run, images, positions, PREPROCESSING, recipe, (), Unwatched())
    half = learned.read(np.arange(learned.images))[(learned.images + 1) // 2 :]
    np.testing.assert_array_equal(sure.read(np.arange(sure.images)), half, "nor those that the teacher is unsure of")
    run.confidence_file.write_bytes(run.confidence_file.read_bytes()[:-1])
    with pytest.raises(TargetsError, match=r"confidence\.npy is missing, or is not what the run wrote"):
        learned_images(run, images, positions, PREPROCESSING, recipe, (), Unwatched())
