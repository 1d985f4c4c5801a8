"""Mixup (Zhang et al., ICLR 2018): images are learned from in pairs, and so is what the teacher says of them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from prgkit.outputs import TeacherOutput


def mixed(
    pixels: Tensor, side: TeacherOutput, strength: float, *, seed: tuple[int, ...]
) -> tuple[Tensor, TeacherOutput]:
    """Return each image [B, S, S, 3] mixed with another of its batch, a * one + (1 - a) * other, a ~ Beta(strength).

    The targets are mixed, not asked for again: the teacher is not in the room. Probabilities are mixed as the images
    are, and so are features, which then get unit length; the pseudo-label is the mixed probabilities' largest.
    """
    generator = np.random.default_rng((*seed, 2))
    share = float(generator.beta(strength, strength))
    share = max(share, 1 - share)  # an image stays the larger part of its mixture, whose number it keeps
    other = torch.from_numpy(generator.permutation(len(pixels))).to(pixels.device)
    blended = share * pixels.float() + (1 - share) * pixels[other].float()
    probabilities = side.logits.softmax(dim=1)
    logits = (share * probabilities + (1 - share) * probabilities[other]).clamp(min=1e-12).log()
    features = F.normalize(share * side.features + (1 - share) * side.features[other], dim=1)
    return blended, side._replace(features=features, logits=logits, labels=logits.argmax(dim=1))
