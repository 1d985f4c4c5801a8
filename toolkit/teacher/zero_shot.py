"""The zero-shot classifier: class names and stored image features in, logits out, adjusted where the recipe asks.

Two adjustments, both without a label: the prior that a teacher brings along (CLIP names some classes too readily) is
taken off its logits, then one temperature gives its probabilities a chosen mean entropy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel
from torch import Tensor

from prgkit.config.recipe import Recipe
from prgkit.config.sections import TargetsConfig
from prgkit.errors import RunError, TargetsError
from prgkit.storage.atomic import read_sealed
from prgkit.storage.run import Run

MOST_ITERATIONS = 2000  # of the prior; a teacher that is sure of nearly every image takes hundreds
CLOSE = 1e-4  # to an even share, relatively, is even enough
WIDEST = math.log(1e6)  # of the temperatures that are tried, as a logarithm
HALVINGS = 50


@dataclass(frozen=True)
class LogitAdjustment:
    """What is done to the logits W [n, C]: (W - log_prior) / temperature."""

    log_prior: Tensor  # [C], up to a constant; zeros leave W as it is
    temperature: float

    @property
    def is_none(self) -> bool:
        """Whether it leaves every logit as it is."""
        return self.temperature == 1 and not bool(self.log_prior.any())

    def apply(self, logits: Tensor) -> Tensor:
        """Return the adjusted logits [..., C]."""
        return (logits - self.log_prior) / self.temperature

    def named(self, classes: Sequence[str]) -> dict[str, float]:
        """Return the log prior by class name, from which `SavedAdjustment` gets it back to the bit."""
        return dict(zip(classes, self.log_prior.double().tolist(), strict=True))


class SavedAdjustment(BaseModel, frozen=True):
    """What a run has found of its teacher's answers before training: its answers.json."""

    made_from: str  # the fingerprint of the data set
    confidence_sha256: str | None  # of confidence.npy, where images are chosen by it
    temperature: float
    log_prior: dict[str, float]  # by class name

    def adjustment(self, classes: Sequence[str]) -> LogitAdjustment:
        """Return the adjustment of logits over ``classes``."""
        return LogitAdjustment(torch.tensor([self.log_prior[name] for name in classes]), self.temperature)


def no_adjustment(classes: int) -> LogitAdjustment:
    """Return the adjustment that leaves every logit, to the bit, as it is."""
    return LogitAdjustment(torch.zeros(classes), 1.0)


@dataclass(frozen=True)
class ZeroShotClassifier:
    """All that turns the teacher's features of an image into logits over the classes."""

    prompts: Tensor  # T [M, C, D]
    logit_scale: float  # s
    prompt_weighting: str
    adjustment: LogitAdjustment

    def class_vectors(self) -> Tensor:
        """Return each class's name as the teacher reads it: the mean over templates, of unit length [C, D]."""
        return torch.nn.functional.normalize(self.prompts.mean(dim=0), dim=1)

    def logits(self, features: Tensor) -> Tensor:
        """Return the adjusted logits W [n, C] of unit features I [n, D]."""
        return self.adjustment.apply(self.raw_logits(features))

    def raw_logits(self, features: Tensor) -> Tensor:
        """Return the logits W [n, C] before any adjustment."""
        return self.combine(self.per_prompt(features))

    def per_prompt(self, features: Tensor) -> Tensor:
        """Return the logits of each template alone: W_m [n, M, C]."""
        return prompt_logits(features, self.prompts, self.logit_scale)

    def combine(self, per_prompt: Tensor) -> Tensor:
        """Return the logits of all templates [n, M, C] together, before any adjustment: W [n, C]."""
        return weighted_logits(per_prompt, self.prompt_weighting)

    def to(self, device: torch.device) -> ZeroShotClassifier:
        """Return the same classifier on another device."""
        moved = replace(self.adjustment, log_prior=self.adjustment.log_prior.to(device))
        return replace(self, prompts=self.prompts.to(device), adjustment=moved)


def prompt_logits(features: Tensor, prompts: Tensor, scale: float) -> Tensor:
    """Return each template's logits W_m = s * I * T_m^T: features [B, D], prompts [M, C, D] -> [B, M, C]."""
    logits: Tensor = scale * torch.einsum("bd,mcd->bmc", features, prompts)
    return logits


def weighted_logits(logits: Tensor, weighting: str) -> Tensor:
    """Combine the templates' logits [B, M, C] into the teacher's answer W [B, C].

    ``max`` weights a template by its largest logit, a_m = max(0, max_c W_m), normalised over templates: a template
    that speaks of nothing in the image counts little. The clamp keeps the weights finite where every logit of an
    image is near zero or below; where no template has a positive logit they count alike. ``softmax`` is the softmax
    of a_m, ``mean`` counts all alike.
    """
    if weighting == "mean" or logits.shape[1] == 1:
        return logits.mean(dim=1)
    strengths = logits.amax(dim=2).clamp(min=0)  # a [B, M]
    if weighting == "softmax":
        weights = strengths.softmax(dim=1)
    else:
        total = strengths.sum(dim=1, keepdim=True)
        weights = torch.where(total > 0, strengths / total.clamp(min=1e-12), 1 / logits.shape[1])
    return torch.einsum("bm,bmc->bc", weights, logits)


def classifier_of(run: Run, recipe: Recipe, prompts: Tensor, logit_scale: float) -> ZeroShotClassifier:
    """Return the classifier that a run's student learned from, with the very adjustment that it learned with.

    Raises:
        RunError: the run's recipe asks for a correction, and what it was is lost.
    """
    adjustment = no_adjustment(len(recipe.classes))
    if recipe.targets.corrects:
        again = "put it back, or distil the recipe into a new run; the targets are kept"
        if not run.answers_file.exists():
            raise RunError("the correction that this run learned with is lost", where=run.answers_file, fix=again)
        try:
            saved = SavedAdjustment.model_validate(read_sealed(run.answers_file, fix=again))
            adjustment = saved.adjustment(recipe.classes)
        except (KeyError, TypeError, ValueError) as error:
            raise RunError(
                f"{run.answers_file.name} is not this recipe's", where=run.answers_file, fix=again
            ) from error
    return ZeroShotClassifier(prompts, logit_scale, recipe.prompt_weighting, adjustment)


def fit_adjustment(logits: Tensor, config: TargetsConfig) -> LogitAdjustment:
    """Return the adjustment that ``config`` asks for, of raw logits W [n, C], rounded to what its file says.

    Raises:
        TargetsError: no temperature gives these logits the entropy that is asked for.
    """
    log_prior = config.debias * fit_log_prior(logits) if config.debias else torch.zeros(logits.shape[1])
    adjustment = LogitAdjustment(log_prior.double().mul(1e6).round().div(1e6).float(), 1.0)
    if config.entropy is None:
        return adjustment
    return replace(adjustment, temperature=float(f"{fit_temperature(adjustment.apply(logits), config.entropy):.6g}"))


def fit_log_prior(logits: Tensor) -> Tensor:
    """Return log p [C] of the prior that has to go for the mean of softmax(W - log p) [n, C] to be even.

    Dividing a posterior by the prior in it is logit adjustment (Menon et al., ICLR 2021); that the prior can be
    estimated from the teacher's own answers is debiased pseudo-labelling (Wang et al., CVPR 2022). Their estimate is
    the mean of softmax(W), and taking it off once is right only where images decide nothing: a teacher that is sure
    of most images spreads its bias over the few close calls, and their mean hardly shows it. So the step is repeated
    until nothing is left to take off, as in Sinkhorn's scaling of one margin; that point is unique, since it minimises
    the convex mean_i logsumexp_c(W_ic - b_c) + mean_c b_c.

    No prior falls below 1/n: n images cannot tell it from none. So a class that nobody matched is helped by a little
    and not given images until it has its even share.
    """
    images, classes = logits.shape
    floor = -math.log(max(images, classes))
    log_prior = torch.full((classes,), -math.log(classes), dtype=torch.float64)
    for _ in range(MOST_ITERATIONS):
        mean = (logits - log_prior.to(logits)).softmax(dim=1).mean(dim=0, dtype=torch.float64)  # [C], sums to 1
        moved = log_prior + mean.clamp(min=1e-30).log()
        moved = (moved - moved.logsumexp(dim=0)).clamp(min=floor)
        step = float((moved - log_prior).abs().max())  # log(C * mean) of the class that is farthest from even
        log_prior = moved
        if step < CLOSE:
            break
    return log_prior.float()


def fit_temperature(logits: Tensor, share: float) -> float:
    """Return T at which the mean entropy of softmax(W / T) [n, C] is ``share`` of ln C; it rises with T.

    Raises:
        TargetsError: there is none, since classes tie in too many images.
    """
    wanted = share * math.log(logits.shape[1])
    low, high = -WIDEST, WIDEST
    if not mean_entropy(logits, math.exp(low)) < wanted < mean_entropy(logits, math.exp(high)):
        raise TargetsError(
            f"no temperature gives the teacher's answers a mean entropy of {share} ln C: their classes tie",
            fix="drop targets.entropy, or give classes and prompts that the teacher can tell apart",
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if mean_entropy(logits, math.exp(middle)) < wanted:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def mean_entropy(logits: Tensor, temperature: float) -> float:
    """Return the mean over images of the entropy of softmax(W / T) [n, C], in nats."""
    logs = ((logits - logits.amax(dim=1, keepdim=True)) / temperature).log_softmax(dim=1)
    return float(-(logs.exp() * logs).sum(dim=1).mean(dtype=torch.float64))
