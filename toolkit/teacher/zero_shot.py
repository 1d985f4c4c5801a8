"""The zero-shot classifier: class names and stored image features in, logits out, corrected where the recipe asks.

Three corrections in turn, all without a label: a refinement fits the classes to the unlabelled images, the prior that a
teacher brings along (CLIP names some classes too readily) is taken off its logits, and one temperature gives its
probabilities a chosen mean entropy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from pydantic import BaseModel
from safetensors import SafetensorError
from torch import Tensor

from prgkit.config.prior import class_shares
from prgkit.config.recipe import Recipe
from prgkit.config.sections import Average, TargetsConfig
from prgkit.errors import RunError, TargetsError
from prgkit.storage.atomic import read_sealed, sha256
from prgkit.storage.run import Run
from prgkit.teacher.refine import LinearRefinement, Refinement, fit_refinement, load_refinement

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
    refinement_sha256: str | None  # of refinement.safetensors, where the recipe asks for one
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
    refinement: Refinement | None = None
    average: Average | None = None  # how K teachers' answers become one; None: the mean of their logits
    widths: tuple[int, ...] = ()  # of their features side by side, where they are not averaged as logits

    @property
    def uncorrected(self) -> ZeroShotClassifier:
        """The teacher by itself."""
        return replace(self, adjustment=no_adjustment(self.prompts.shape[1]), refinement=None)

    def class_vectors(self) -> Tensor:
        """Return each class's name as the teacher reads it: the mean over templates, of unit length [C, D]."""
        return torch.nn.functional.normalize(self.prompts.mean(dim=0), dim=1)

    def scoring(self) -> tuple[Tensor, float]:
        """Return unit class vectors [C, D] and a scale; features times both are the answers without an adjustment.

        They are the refined vectors where the refinement is linear, else those of the names.
        """
        if isinstance(self.refinement, LinearRefinement):
            return self.refinement.vectors, self.refinement.scale
        return self.class_vectors(), self.logit_scale

    def logits(self, features: Tensor) -> Tensor:
        """Return the corrected logits W [n, C] of unit features I [n, D]."""
        return self.correct(features, self.raw_logits(features))

    def correct(self, features: Tensor, raw_logits: Tensor) -> Tensor:
        """Return the corrected logits [n, C] of unit features [n, D] and the teacher's own logits of them [n, C]."""
        if self.refinement is not None:
            raw_logits = self.refinement.apply(features, raw_logits)
        return self.adjustment.apply(raw_logits)

    def raw_logits(self, features: Tensor) -> Tensor:
        """Return the logits W [n, C] before any correction."""
        if self.average is None:
            return self.combine(self.per_prompt(features))
        each = self.each_teacher(features)
        return (each.log_softmax(dim=2) + log_shares(each, self.average)[:, :, None]).logsumexp(dim=0)

    def each_teacher(self, features: Tensor) -> Tensor:
        """Return the logits of each of K teachers alone [K, n, C], of their joint features (`TeacherEnsemble`)."""
        sides = zip(*(torch.split(one, list(self.widths), dim=-1) for one in (features, self.prompts)), strict=True)
        scale = len(self.widths) * self.logit_scale
        return torch.stack([self.combine(prompt_logits(seen, read, scale)) for seen, read in sides])

    def per_prompt(self, features: Tensor) -> Tensor:
        """Return the logits of each template alone: W_m [n, M, C]."""
        return prompt_logits(features, self.prompts, self.logit_scale)

    def combine(self, per_prompt: Tensor) -> Tensor:
        """Return the logits of all templates [n, M, C] together, before any correction: W [n, C]."""
        return weighted_logits(per_prompt, self.prompt_weighting)

    def to(self, device: torch.device) -> ZeroShotClassifier:
        """Return the same classifier on another device."""
        moved = replace(self.adjustment, log_prior=self.adjustment.log_prior.to(device))
        refinement = self.refinement.to(device) if self.refinement is not None else None
        return replace(self, prompts=self.prompts.to(device), adjustment=moved, refinement=refinement)


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


def log_shares(logits: Tensor, average: Average) -> Tensor:
    """Return the logarithm of each teacher's share in the answer to each image [K, n], for their logits [K, n, C].

    ``probabilities`` gives all the same (MEAL V2, arXiv 2009.08453); ``confidence`` the softmax over teachers of minus
    the entropy of what each says, so that a teacher that is always sure outvotes others whether it is right or not.
    """
    entropies = torch.special.entr(logits.softmax(dim=2)).sum(dim=2)  # [K, n]
    return (-entropies if average == "confidence" else torch.zeros_like(entropies)).log_softmax(dim=0)


def classifier_of(run: Run, recipe: Recipe, prompts: Tensor, logit_scale: float) -> ZeroShotClassifier:
    """Return the classifier that a run's student learned from, with the very corrections that it learned with.

    Raises:
        RunError: the run's recipe asks for a correction, and what it was is lost.
    """
    adjustment, refinement = no_adjustment(len(recipe.classes)), None
    if recipe.targets.corrects:
        path, again = run.answers_file, "put it back, or distil the recipe into a new run; the targets are kept"
        try:
            if not path.exists():
                raise RunError("the correction that this run learned with is lost", where=path, fix=again)
            saved = SavedAdjustment.model_validate(read_sealed(path, fix=again))
            adjustment = saved.adjustment(recipe.classes)
            if saved.refinement_sha256 is not None:
                path = run.refinement_file
                if sha256(path) != saved.refinement_sha256:
                    raise ValueError("it is another one")
                refinement = load_refinement(path)
        except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            raise RunError(
                f"{path.name} is missing, or not what this recipe's run wrote", where=path, fix=again
            ) from error
    return ZeroShotClassifier(prompts, logit_scale, recipe.prompt_weighting, adjustment, refinement)


def fit_corrections(
    classifier: ZeroShotClassifier, features: Tensor, logits: Tensor, config: TargetsConfig, classes: Sequence[str]
) -> ZeroShotClassifier:
    """Return the classifier with the corrections that ``config`` asks for, fitted to unlabelled images.

    Args:
        classifier: the teacher by itself.
        features: I [N, D].
        logits: its own logits of them W [N, C].
        config: what is corrected.
        classes: C names, since a prior may be given by name.

    Raises:
        TargetsError: no temperature gives the answers the entropy that is asked for.
    """
    shares = class_shares(config.prior, classes)
    prior = None if shares is None else torch.tensor(shares, device=features.device)
    if config.refine is not None:
        refinement = fit_refinement(
            config.refine, features, classifier.class_vectors(), logits, scale=classifier.logit_scale, prior=prior
        )
        classifier, logits = replace(classifier, refinement=refinement), refinement.apply(features, logits)
    adjustment = fit_adjustment(logits.cpu(), config, None if prior is None else prior.cpu())
    return replace(classifier, adjustment=adjustment)


def fit_adjustment(logits: Tensor, config: TargetsConfig, prior: Tensor | None = None) -> LogitAdjustment:
    """Return the adjustment that ``config`` asks for, of logits W [n, C], rounded to what its file says.

    Args:
        logits: W, refined where the recipe asks for it.
        config: says how much of a prior is taken off, and the entropy.
        prior: the share [C] of each class that is to remain; None: even ones.

    Raises:
        TargetsError: no temperature gives these logits the entropy that is asked for.
    """
    log_prior = config.debias * fit_log_prior(logits, prior) if config.debias else torch.zeros(logits.shape[1])
    adjustment = LogitAdjustment(log_prior.double().mul(1e6).round().div(1e6).float(), 1.0)
    if config.entropy is None:
        return adjustment
    return replace(adjustment, temperature=float(f"{fit_temperature(adjustment.apply(logits), config.entropy):.6g}"))


def fit_log_prior(logits: Tensor, prior: Tensor | None = None) -> Tensor:
    """Return log p / q [C] that has to go for the mean of softmax(W - log p / q) [n, C] to be q: ``prior``, or even.

    Dividing a posterior by the prior in it is logit adjustment (Menon et al., ICLR 2021); that the prior can be
    estimated from the teacher's own answers is debiased pseudo-labelling (Wang et al., CVPR 2022). Their estimate is
    the mean of softmax(W), and taking it off once is right only where images decide nothing: a teacher that is sure
    of most images spreads its bias over the few close calls, and their mean hardly shows it. So the step is repeated
    until nothing is left to take off, as in Sinkhorn's scaling of one margin; that point is unique, since it minimises
    the convex mean_i logsumexp_c(W_ic - b_c) + sum_c q_c b_c, q the shares that are to remain.

    The teacher's own p is what is sought, and no p falls below 1/n: n images cannot tell it from none. So a class that
    nobody matched is helped by a little and not given images until it has its share, however rare or common it is.
    """
    images, classes = logits.shape
    floor = -math.log(max(images, classes))
    wanted = torch.zeros(classes, dtype=torch.float64) if prior is None else (prior.double() * classes).log()
    log_prior = torch.full((classes,), -math.log(classes), dtype=torch.float64)
    for _ in range(MOST_ITERATIONS):
        shift = (log_prior - wanted).to(logits)
        mean = (logits - shift).softmax(dim=1).mean(dim=0, dtype=torch.float64)  # [C], sums to 1
        moved = log_prior + mean.clamp(min=1e-30).log() - wanted
        moved = (moved - moved.logsumexp(dim=0)).clamp(min=floor)
        step = float((moved - log_prior).abs().max())  # of the class that is farthest from its share, as a logarithm
        log_prior = moved
        if step < CLOSE:
            break
    return (log_prior - wanted).float()


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
