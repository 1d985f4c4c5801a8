"""What a recipe can set of each objective; the objectives themselves are in `prgkit.objectives`, beside torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Page(BaseModel):
    """The common ground of every section: immutable, and no key that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ObjectivePage(Page):
    """What every objective has: its share in a weighted list, and how the prompts are combined (METHOD: W)."""

    weight: float = Field(1.0, gt=0)
    prompt_weighting: Literal["max", "mean", "softmax"] = "max"


class CE(ObjectivePage):
    """Cross-entropy with the teacher's pseudo-labels."""

    name: Literal["ce"]


class KD(ObjectivePage):
    """Knowledge distillation: softened teacher probabilities beside the pseudo-labels (Hinton et al., 2015)."""

    name: Literal["kd"]
    alpha: float = Field(0.9, ge=0, le=1)
    temperature: float = Field(4.0, gt=0)


class DKD(ObjectivePage):
    """Decoupled knowledge distillation: the label's share and the other classes apart (Zhao et al., 2022)."""

    name: Literal["dkd"]
    alpha: float = Field(1.0, ge=0)
    beta: float = Field(8.0, ge=0)
    temperature: float = Field(4.0, gt=0)
    # Over which the distillation grows to its full weight; None: the paper's 20, at most a fifth of the run.
    warmup_epochs: float | None = Field(None, ge=0)


class DIST(ObjectivePage):
    """Correlation of probabilities, within an image and within a class over the batch (Huang et al., 2022)."""

    name: Literal["dist"]
    inter_weight: float = Field(2.0, ge=0)
    intra_weight: float = Field(2.0, ge=0)
    temperature: float = Field(4.0, gt=0)


class RKD(ObjectivePage):
    """Relational distillation: distances and angles between the batch's features (Park et al., 2019)."""

    name: Literal["rkd"]
    distance_weight: float = Field(25.0, ge=0)
    angle_weight: float = Field(50.0, ge=0)


class ND(ObjectivePage):
    """Norm and direction: features turned towards the teacher's class means, and grown (Wang et al., 2023)."""

    name: Literal["nd"]
    kl_weight: float = Field(1.0, ge=0)
    nd_weight: float = Field(1.0, ge=0)
    temperature: float = Field(4.0, gt=0)


class PLD(ObjectivePage):
    """Plackett-Luce distillation: the teacher's whole ranking of the classes (arXiv 2506.12542)."""

    name: Literal["pld"]
    temperature: float = Field(4.0, gt=0)


class PRG(ObjectivePage):
    """Proxy relational graph: nodes, class proxies and the edges between them (arXiv 2408.12248, reconstructed)."""

    name: Literal["prg"]
    supervision: Literal["soft", "hard"] = "soft"
    node_weight: float = Field(3.0, ge=0)
    edge_weight: float = Field(1.0, ge=0)
    block: Literal["softmax", "zscore", "l2", "raw"] = "softmax"
    node_loss: Literal["pearson", "mse"] = "pearson"
    edge_loss: Literal["mse", "pearson"] = "mse"
    proxy_momentum: float = Field(0.9, ge=0, lt=1)


AnyObjective = Annotated[PRG | KD | CE | DKD | DIST | RKD | ND | PLD, Field(discriminator="name")]
OBJECTIVES: dict[str, type[ObjectivePage]] = {
    "prg": PRG,
    "kd": KD,
    "ce": CE,
    "dkd": DKD,
    "dist": DIST,
    "rkd": RKD,
    "nd": ND,
    "pld": PLD,
}


def objective_lines() -> dict[str, str]:
    """Return each objective's name with one line on what it is."""
    return {name: (model.__doc__ or "").splitlines()[0] for name, model in OBJECTIVES.items()}
