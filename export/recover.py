"""Label-free recovery: a short fine-tune with fake quantisation brings the student's answers back to a file in INT8.

The pupil is the student's fused network. Weights are rounded by output channel, activations within the ranges of their
calibration, and gradients go straight through (Jacob et al., CVPR 2018). What it has to match are the logits of the
student in FP32, on unlabelled images that the student learned from: agreement with them is what the floor asks for.

Measured on two EfficientNet-B0 at 64 px (three and four short epochs on CIFAR images), 2,000 held-out images, at a
learning rate of 1e-4, when ranges were percentiles of values and not yet of images (see ranges.py). Far from the floor
it brings much back: with every block in INT8 the same answer as FP32 on 78.3 before and 84.4 % after 200 steps, 63.4
and 88.3 % after 300; TensorRT's layout gains as much, from 77.5 to 84.6 %. The teacher's stored answers do not help,
since they go on teaching: with them alone 34 % is left, with half of each 58 % (100 steps at 3e-4, where FP32's logits
alone give 82.5 %). Learnt ranges, as in LSQ, are no better than fixed: 82.8 %.

Near the floor little was won. Weights made for INT8 do worse in float, so blocks put back no longer help, and large
steps cost more than they mend: with 9 of 17 blocks in INT8 96.6 % before, and after 80 steps 93.8 % at 1e-4, 95.5 % at
1e-5 and 96.4 % at 2e-6; after 300 at 1e-5, as it is done now, 96.7 %, and half of the mean KL. Hence the small rate,
the blocks that are left in float from the start, and that the file without recovery stays unless the other has more
blocks in INT8. It has won on no student so far. The new weights alone change answers: of an EfficientNet-B0 at 224 px
96.6 % were FP32's with all 26 blocks in INT8 before and 96.5 % after, and 97.8 % after with a single one.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from prgkit.errors import ExportError
from prgkit.export.fidelity import Pixels, logits_of
from prgkit.export.floor import Facts
from prgkit.export.graph import save
from prgkit.export.parity import FP32_RELATIVE_TOLERANCE
from prgkit.export.quantize import weight_scales
from prgkit.export.ranges import Spread

BATCH = 32
PIXELS = 2_000 * 224 * 224  # that are learned from, so that the price does not grow with the size of the images
STEPS = (60, 300)  # at the least and at the most, whatever the size of the images
LEARNING_RATE = 1e-5  # Adam's, falling to zero along a cosine
SEED = 0
LEAST_SCALE = 1e-12

Grid = tuple[float, int]  # scale and zero-point of uint8


@dataclass(frozen=True)
class Learned:
    """Images that the student learned from, none of them held out."""

    images: int
    read: Callable[[NDArray[np.int64]], Pixels]  # places [n], each below `images`, to pixels [n, S, S, 3]
    origin: str  # their fingerprint


@dataclass(frozen=True)
class Folded:
    """A network with the weights of its FP32 file, into which its batch norms are folded."""

    network: nn.Module
    layers: Mapping[str, nn.Module]  # by the node of the file that computes it
    weights: Mapping[str, nn.Parameter]  # by their name in the file


def recover(
    module: nn.Module,
    source: Path,
    path: Path,
    *,
    nodes: Collection[str],
    spreads: Mapping[str, Spread],
    tail: float,
    learned: Learned,
    note: Callable[[str], None],
) -> Facts:
    """Write ``source``, the FP32 file of ``module``, to ``path`` with weights that bear INT8 better; say what was done.

    ``nodes`` compute in 8 bits meanwhile, within the ranges of ``spreads`` for a share ``tail`` of images. It is a
    function of all of these and of `SEED`: on the same machine it gives the same bits again.

    Raises:
        PrgkitError: the module does not compute what its file computes, or an image can no longer be read.
    """
    started = time.monotonic()
    first = learned.read(np.arange(min(BATCH, learned.images)))
    steps = steps_for(first[0, :, :, 0].size)
    student, pupil = (folded(module, source) for _ in range(2))
    require_same(student.network, source, first)
    fake_quantise(pupil, source, nodes, spreads, tail)
    weights = [weight.requires_grad_(True) for weight in pupil.weights.values()]
    optimizer = torch.optim.Adam(weights, lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    note(f"INT8: the floor is missed; {steps} steps of {BATCH} images with fake quantisation may recover it")
    generator, costs = np.random.default_rng(SEED), []
    for step in range(steps):
        pixels = torch.from_numpy(learned.read(generator.integers(learned.images, size=BATCH)))  # [BATCH, S, S, 3]
        with torch.no_grad():
            wanted = student.network(pixels)
        cost = divergence(wanted, pupil.network(pixels))
        optimizer.zero_grad()
        cost.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        costs.append(cost.item())
        if step + 1 in (steps // 4, steps // 2, 3 * steps // 4):
            note(f"INT8: step {step + 1} of {steps}, KL {np.mean(costs[-steps // 10 :]):.4f}")
    write_weights(source, path, pupil.weights)
    part = max(1, steps // 10)
    return {
        "steps": steps,
        "batch": BATCH,
        "images": learned.images,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
        "kl": [float(np.mean(costs[:part])), float(np.mean(costs[-part:]))],  # of the first and the last tenth
        "seconds": round(time.monotonic() - started, 1),
    }


def steps_for(pixels: int) -> int:
    """Return for how many steps images of so many ``pixels`` are learned from."""
    return min(max(PIXELS // (BATCH * pixels), STEPS[0]), STEPS[1])


def folded(module: nn.Module, source: Path) -> Folded:
    """Return a copy of ``module`` that computes what its FP32 file computes, with the file's weights."""
    network = copy.deepcopy(module).eval().requires_grad_(False).to(memory_format=torch.channels_last)
    modules = dict(network.named_modules())
    for norm in modules.values():
        if isinstance(norm, nn.BatchNorm2d):
            leave_as_it_is(norm)
    graph = onnx.load(str(source)).graph
    uses = Counter(name for node in graph.node for name in node.input)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    layers: dict[str, nn.Module] = {}
    weights: dict[str, nn.Parameter] = {}
    for node in graph.node:
        layer = modules.get(node.input[1].removesuffix(".weight")) if node.op_type in ("Conv", "Gemm") else None
        names = list(node.input[1:])
        if not isinstance(layer, nn.Conv2d | nn.Linear) or not all(name in constants for name in names):
            continue
        if constants[names[0]].shape == layer.weight.shape:
            tensors = [nn.Parameter(torch.from_numpy(constants[name].copy())) for name in names]
            layer.register_parameter("weight", tensors[0])
            layer.register_parameter("bias", tensors[1] if len(tensors) > 1 else None)
            layers[node.name] = layer
            weights.update({name: one for name, one in zip(names, tensors, strict=True) if uses[name] == 1})
    return Folded(network.requires_grad_(False), layers, weights)


def leave_as_it_is(norm: nn.BatchNorm2d) -> None:
    """Make a batch norm, which the layer before it has taken in, pass on what it is given."""
    norm.eps = 0.0
    for tensor, value in ((norm.running_mean, 0), (norm.running_var, 1), (norm.weight, 1), (norm.bias, 0)):
        if tensor is not None:
            tensor.fill_(value)


def require_same(network: nn.Module, source: Path, pixels: Pixels) -> None:
    """Assert that the folded network gives the logits of its file.

    Raises:
        ExportError: it does not, so what it learned would be of no use to the file.
    """
    wanted = logits_of(source, pixels)
    with torch.no_grad():
        difference = float(np.abs(network(torch.from_numpy(pixels)).numpy() - wanted).max())
    if not difference <= FP32_RELATIVE_TOLERANCE * max(1.0, float(np.abs(wanted).max())):
        raise ExportError(f"the file's weights do not fit the student's layers (logits differ by {difference:.3g})")


def fake_quantise(
    pupil: Folded, source: Path, nodes: Collection[str], spreads: Mapping[str, Spread], tail: float
) -> None:
    """Round what the layers of ``nodes`` take and give, and their weights, as ONNX Runtime's layout does."""
    for node in onnx.load(str(source)).graph.node:
        if node.name in nodes and (layer := pupil.layers.get(node.name)):
            taken, given = (grid(spreads[name], tail) for name in (node.input[0], node.output[0]))
            parametrize.register_parametrization(layer, "weight", RoundedWeight())
            layer.register_forward_pre_hook(lambda _, inputs, taken=taken: rounded(inputs[0], taken))
            layer.register_forward_hook(lambda _, inputs, output, given=given: rounded(output, given))


def grid(spread: Spread, tail: float) -> Grid:
    """Return the steps of uint8 that a tensor's range is cut into."""
    low, high = spread.range(tail, symmetric=False)
    scale = (high - low) / 255 or 1.0
    return scale, round(-low / scale)


def rounded(values: Tensor, steps: Grid) -> Tensor:
    """Round activations; the gradient goes straight through where nothing is clipped, and is zero elsewhere."""
    return torch.fake_quantize_per_tensor_affine(values, *steps, 0, 255)


class RoundedWeight(nn.Module):
    """A weight [out, in, h, w] in int8 steps, with a scale for each output channel; the gradient goes through."""

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight as the file will hold it."""
        scale = torch.from_numpy(weight_scales(weight.detach().numpy(), "onnxruntime")).clamp(min=LEAST_SCALE)  # [out]
        zero = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """Return the mean KL(wanted || found) of the softmax over logits [n, classes], in nats."""
    return F.kl_div(found.log_softmax(1), wanted.log_softmax(1), reduction="batchmean", log_target=True)


def write_weights(source: Path, path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write ``source`` with ``weights`` in the place of those of the same names."""
    model = onnx.load(str(source))
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            values = weights[tensor.name].detach().contiguous().numpy()
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    save(model, path)
