"""PRG, the Proxy Relational Graph (arXiv 2408.12248), reconstructed from its abstract and captions.

Notation: B images, C classes, D the teacher's feature width. Teacher and student each have a graph. A node is an image
(its features beside its logits), a proxy is a class (a moving average of its images' nodes), an edge is the Pearson
correlation of one image's node with one class's proxy.
"""

from __future__ import annotations

import math

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from prgkit.config import objectives
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput, cross_entropy, kl_divergence, several_processes


class PRG(nn.Module):
    """loss = supervision + node_weight * node + edge_weight * edge; the returned terms are weighted already."""

    uses_features = True
    teacher_proxies: Tensor
    student_proxies: Tensor
    seen: Tensor

    def __init__(self, config: objectives.PRG, context: LossContext) -> None:
        super().__init__()
        self.config = config
        # No gradient reaches a proxy; as buffers they are saved with the checkpoint.
        shape = (context.classes, context.width + context.classes)
        self.register_buffer("teacher_proxies", torch.zeros(shape))  # P^t [C, D+C]
        self.register_buffer("student_proxies", torch.zeros(shape))  # P^s [C, D+C]
        self.register_buffer("seen", torch.zeros(context.classes, dtype=torch.bool))

    def forward(self, student: StudentOutput, teacher: TeacherOutput) -> dict[str, Tensor]:
        """Return the loss terms ``supervision``, ``node`` and ``edge``, each a scalar."""
        teacher_nodes = nodes(teacher.features, teacher.logits, self.config.block)  # N^t [B, D+C]
        student_nodes = nodes(student.features, student.logits, self.config.block)  # N^s [B, D+C]
        self.update_proxies(student_nodes.detach(), teacher_nodes, teacher.labels)
        teacher_edges = correlate(teacher_nodes, self.teacher_proxies)  # E^t [B, C], 0 to classes not seen yet
        student_edges = correlate(student_nodes, self.student_proxies)  # E^s [B, C]

        if self.config.supervision == "soft":
            supervision = kl_divergence(student.logits, teacher.logits, weights=teacher.weights)
        else:
            supervision = cross_entropy(student.logits, teacher.labels, teacher.weights)
        node = (1 - pearson(student_nodes, teacher_nodes)).mean()
        edge = (student_edges - teacher_edges).square().sum() / (len(student_edges) * self.seen.sum())
        return {
            "supervision": supervision,
            "node": self.config.node_weight * node,
            "edge": self.config.edge_weight * edge,
        }

    @torch.no_grad()
    def update_proxies(self, student_nodes: Tensor, teacher_nodes: Tensor, labels: Tensor) -> None:
        """P_c <- mu P_c + (1 - mu) * mean of N over the batch's images with y = c, over all processes.

        The teacher's assignment y serves both graphs. A class seen for the first time starts at its batch mean; a
        class that is not in the batch is left as it is.
        """
        assignment = F.one_hot(labels, len(self.seen)).to(teacher_nodes.dtype)  # [B, C]
        counts = assignment.sum(dim=0)  # [C]
        sums = assignment.T @ torch.cat([student_nodes, teacher_nodes], dim=1)  # [C, 2(D+C)]
        if several_processes():
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        present = counts > 0
        student_means, teacher_means = torch.chunk(sums / counts.clamp(min=1)[:, None], 2, dim=1)
        # 0 where there is nothing to keep yet
        momentum = self.config.proxy_momentum * self.seen.to(teacher_means.dtype)[:, None]
        for proxies, mean in ((self.student_proxies, student_means), (self.teacher_proxies, teacher_means)):
            proxies.copy_(torch.where(present[:, None], momentum * proxies + (1 - momentum) * mean, proxies))
        self.seen |= present


def nodes(features: Tensor, logits: Tensor, block: str) -> Tensor:
    """Return one node an image, N = [F ; block(L)] [B, D+C].

    With raw CLIP logits, whose scale is about 100, all nodes look alike and edges carry no information; the other
    blocks prevent that.
    """
    if block == "softmax":
        return torch.cat([F.normalize(features, dim=1), logits.softmax(dim=1)], dim=1)
    if block == "zscore":
        return torch.cat([standardise(features), standardise(logits)], dim=1)
    if block == "l2":
        return torch.cat([F.normalize(centre(features), dim=1), F.normalize(centre(logits), dim=1)], dim=1)
    return torch.cat([features, logits], dim=1)  # raw: both unscaled, as the paper's figure caption reads


def correlate(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the Pearson correlation of every row [B, N] with every other [C, N]: [B, C], as one matrix product."""
    correlations: Tensor = F.normalize(centre(rows), dim=1) @ F.normalize(centre(columns), dim=1).T
    return correlations


def pearson(first: Tensor, second: Tensor) -> Tensor:
    """Return the Pearson correlation of each row [B, N] with its counterpart: [B]."""
    return F.cosine_similarity(centre(first), centre(second), dim=1)


def centre(rows: Tensor) -> Tensor:
    """Return rows [B, N] with mean zero."""
    return rows - rows.mean(dim=1, keepdim=True)


def standardise(rows: Tensor) -> Tensor:
    """Return rows [B, N] with mean zero and standard deviation one."""
    return math.sqrt(rows.shape[1]) * F.normalize(centre(rows), dim=1)
