"""Train the demo's teacher: a tiny open_clip model that reads digits it has only ever seen drawn by these files.

    python tools/demo_teacher/train_teacher.py --out teacher/ --threads 1 --report     (made the shipped weights)

Both towers learn together, by CLIP's contrastive loss, from pictures rendered by ``glyphs.py`` and captions made of
words. No real digit takes part, with or without its label: training uses rendered pictures, the best epoch is the one
that best reads rendered pictures in fonts and hands kept out of the training, and the temperature is learned with the
rest. Only ``--report`` looks at the real digits, after the weights have been written, and changes nothing. So the demo
that follows is zero-shot.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from glyphs import render_set
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from prgkit.demo.digits import CLASSES, TEMPLATES, load_digits
from prgkit.storage.atomic import write_json, writing

IMAGE_SIZE = 32
CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {
            "timm_model_name": "test_resnet",
            "timm_model_pretrained": False,
            "timm_pool": "avg",
            "timm_proj": "linear",
            "image_size": IMAGE_SIZE,
        },
        # open_clip's vocabulary of 49,408 tokens is most of the file, so the text tower is narrow.
        "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 24, "heads": 4, "layers": 2},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}
# Captions are broader than the demo's prompts, so that a user's own wording is understood as well.
CAPTIONS = (
    *TEMPLATES,
    "a photo of a {}.", "a picture of the number {}.", "an image of the digit {}.", "the number {}.", "the digit {}",
    "a drawing of a {}", "a blurry photo of the digit {}.", "a low resolution image of the number {}.",
    "the numeral {}", "this is the number {}", "a {} written by hand", "a scanned {}",
    "a black and white photo of the digit {}.", "a grayscale image of the handwritten digit {}.", "handwriting: {}",
    "a sketch of the number {}", "a bad photo of a {}.", "a pixelated number {}.", "number {}", "digit {}",
    "a good picture of the handwritten number {}.", "someone wrote a {}", "a figure {} on paper",
    "the digit {} in white on black.", "a tiny image of the digit {}.", "a {} drawn with a pen.",
)  # fmt: skip


def main() -> None:
    """Parse the command line, train, write, and report if asked."""
    parser = argparse.ArgumentParser(description="Train the demo's teacher on rendered digits.")
    parser.add_argument("--out", type=Path, required=True, help="folder for open_clip_config.json and the weights")
    parser.add_argument("--images", type=int, default=50_000, help="rendered pictures to train on")
    parser.add_argument("--held-out", type=int, default=4_000, help="rendered pictures to choose the best epoch on")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, and processes that render")
    parser.add_argument("--report", action="store_true", help="afterwards, measure the result on the real digits")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    started = time.monotonic()
    train(
        options.out,
        images=options.images,
        held_out=options.held_out,
        epochs=options.epochs,
        batch_size=options.batch_size,
        seed=options.seed,
        workers=options.threads,
    )
    print(f"trained in {time.monotonic() - started:.0f} s, written to {options.out}")
    if options.report:
        report(options.out)


def train(out: Path, *, images: int, held_out: int, epochs: int, batch_size: int, seed: int, workers: int) -> None:
    """Train from scratch on rendered pictures and write the epoch that reads the held-out ones best."""
    random.seed(seed)
    torch.manual_seed(seed)
    pictures, digits = _render(images, seed=seed, held_out=False, workers=workers)
    held_pictures, held_digits = _render(held_out, seed=seed, held_out=True, workers=workers)
    write_json(out / "open_clip_config.json", CONFIG)
    model = open_clip.model.CLIP(**CONFIG["model_cfg"])
    model.visual.to(memory_format=torch.channels_last)
    captions = _captions(out)  # [digit][caption] -> tokens
    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=2e-3, betas=(0.9, 0.98))
    steps = epochs * (images // batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmed_cosine(step, steps))
    best, best_weights = -1.0, model.state_dict()
    for epoch in range(epochs):
        model.train()
        losses = []
        for chosen in torch.randperm(images)[: images // batch_size * batch_size].view(-1, batch_size):
            loss = _contrastive_loss(model, _augmented(pictures[chosen]), digits[chosen], captions)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0.0, math.log(100.0))  # as CLIP does
            losses.append(loss.item())
        accuracy = _held_out_accuracy(model, held_pictures, held_digits, captions)
        scale = model.logit_scale.exp().item()
        line = f"epoch {epoch + 1:2d}  loss {np.mean(losses):.4f}  held-out glyphs {accuracy:.2f} %  scale {scale:.1f}"
        print(line, flush=True)
        if accuracy > best:
            best, best_weights = accuracy, copy.deepcopy(model.state_dict())
    _write_weights(out, best_weights, captions)


def report(folder: Path) -> None:
    """Print the zero-shot accuracy on the real test digits, through open_clip, of the weights in ``folder``."""
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    images, labels = load_digits("test")
    pixels = np.stack(
        [
            np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
            for image in images
        ]
    )
    model.eval()
    with torch.inference_mode():
        features = model.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1, normalize=True)
        texts = torch.stack(
            [model.encode_text(tokenizer([t.format(c) for c in CLASSES]), normalize=True) for t in TEMPLATES]
        )  # [templates, classes, dim]
        target = torch.tensor(labels)
        for template, text in zip(TEMPLATES, texts, strict=True):
            print(f"{_top1(features @ text.T, target):6.2f} %  {template!r}")
        logits = model.logit_scale.exp() * features @ F.normalize(texts.mean(0), dim=-1).T
        probabilities = logits.softmax(-1)
        print(f"{_top1(logits, target):6.2f} %  all {len(TEMPLATES)} templates, {len(labels)} real digits")
        confidence = 100 * probabilities.amax(-1).mean()
        print(f"mean confidence {confidence:.2f} %, ECE {100 * _calibration_error(probabilities, target):.2f} %,")
        entropy = -(probabilities * probabilities.clamp_min(1e-9).log()).sum(-1).mean()
        loss = F.cross_entropy(logits, target)
        print(f"NLL {loss:.3f} nat, entropy {entropy:.3f} nat, logit scale {model.logit_scale.exp():.1f}")


def _render(count: int, *, seed: int, held_out: bool, workers: int) -> tuple[Tensor, Tensor]:
    """Render pictures [count, 8, 8] in 0..1 and their digits [count], the same with any number of workers."""
    chunks = [(min(2_000, count - start), 1_000 * seed + i, held_out) for i, start in enumerate(range(0, count, 2_000))]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_render_chunk, chunks))
    pictures = np.concatenate([part[0] for part in parts])
    return torch.from_numpy(pictures).float() / 16, torch.from_numpy(np.concatenate([part[1] for part in parts]))


def _render_chunk(chunk: tuple[int, int, bool]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    count, seed, held_out = chunk
    return render_set(count, seed=seed, held_out=held_out)


def _captions(folder: Path) -> Tensor:
    """Tokenise every caption of every digit, as a word and as a numeral: [digits, captions, context]."""
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    return torch.stack(
        [
            tokenizer([c.format(name) for name in (word, str(digit)) for c in CAPTIONS])
            for digit, word in enumerate(CLASSES)
        ]
    )


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    return [
        {"params": decayed, "weight_decay": 0.05},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]


def _warmed_cosine(step: int, steps: int) -> float:
    warmup = min(200, steps // 10 + 1)
    return step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _contrastive_loss(model: Any, images: Tensor, digits: Tensor, captions: Tensor) -> Tensor:
    """CLIP's symmetric loss; every caption of the picture's digit is right, as a batch holds each digit many times."""
    tokens = captions[digits, torch.randint(captions.shape[1], digits.shape)]  # [batch, context]
    image_features = model.encode_image(
        images.contiguous(memory_format=torch.channels_last), normalize=True
    )  # [batch, dim]
    text_features = model.encode_text(tokens, normalize=True)
    logits = model.logit_scale.exp() * image_features @ text_features.T  # [batch, batch]
    same = (digits[:, None] == digits[None, :]).float()
    target = same / same.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def _augmented(pictures: Tensor) -> Tensor:
    """Enlarge [batch, 8, 8] as the teacher's preprocessing does, with random contrast and a small affine motion."""
    count = len(pictures)
    contrast = torch.empty(count, 1, 1).uniform_(0.6, 1.6)
    enlarged = _enlarged(pictures.pow(contrast))[:, :1]  # [batch, 1, S, S]
    angle = torch.randn(count) * 0.09
    scale = torch.empty(count, 2).uniform_(0.8, 1.18)
    shear = torch.randn(count) * 0.08
    moved = torch.rand(count) < 0.7
    angle, shear = angle * moved, shear * moved
    scale = torch.where(moved[:, None], scale, torch.ones(()))
    shift = torch.randn(count, 2) * 0.09 * moved[:, None]
    theta = torch.stack(
        [
            torch.stack([scale[:, 0] * angle.cos(), -angle.sin() + shear, shift[:, 0]], 1),
            torch.stack([angle.sin(), scale[:, 1] * angle.cos(), shift[:, 1]], 1),
        ],
        1,
    )  # [batch, 2, 3]
    grid = F.affine_grid(theta, list(enlarged.shape), align_corners=False)
    # -1 is black, so what comes in from outside is filled by sampling image + 1.
    return (F.grid_sample(enlarged + 1, grid, align_corners=False) - 1).expand(-1, 3, -1, -1)


def _enlarged(pictures: Tensor) -> Tensor:
    """Enlarge [batch, 8, 8] in 0..1 to normalised [batch, 3, S, S]; antialias makes torch's bicubic kernel Pillow's."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    enlarged = F.interpolate(pictures[:, None], size, mode="bicubic", antialias=True).clamp(0, 1)
    return (enlarged * 2 - 1).expand(-1, 3, -1, -1)


@torch.inference_mode()
def _held_out_accuracy(model: Any, pictures: Tensor, digits: Tensor, captions: Tensor) -> float:
    model.eval()
    texts = F.normalize(
        model.encode_text(captions.flatten(0, 1), normalize=True).unflatten(0, captions.shape[:2]).mean(1), dim=-1
    )
    features = torch.cat([model.encode_image(_enlarged(part), normalize=True) for part in torch.split(pictures, 500)])
    return _top1(features @ texts.T, digits)


def _top1(logits: Tensor, target: Tensor) -> float:
    return 100 * (logits.argmax(-1) == target).double().mean().item()


def _calibration_error(probabilities: Tensor, target: Tensor) -> float:
    """Expected calibration error over fifteen equal bins of confidence."""
    confidence, answer = probabilities.max(-1)
    bins = (confidence * 15).long().clamp_max(14)
    gaps = [(confidence[bins == b] - (answer == target)[bins == b].float()).sum().abs() for b in range(15)]
    return float(sum(gap.item() for gap in gaps) / len(target))


def _write_weights(out: Path, weights: dict[str, Tensor], captions: Tensor) -> None:
    """Write the weights in half precision; a word that no caption used becomes zero: it says nothing, not noise."""
    weights = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    unused = torch.ones(len(weights["token_embedding.weight"]), dtype=torch.bool)
    unused[captions.flatten()] = False
    weights["token_embedding.weight"] = weights["token_embedding.weight"].masked_fill(unused[:, None], 0)
    with writing(out / "open_clip_model.safetensors") as path:
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
        path.chmod(0o644)  # safetensors writes for the owner alone; a wheel would carry that to every user


if __name__ == "__main__":
    main()
