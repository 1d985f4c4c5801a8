"""Students ranked without training: the score by hand, what leaves it as it is, and what it is held against."""

from __future__ import annotations

import itertools
import json
import math
import os
import shlex
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from prgkit.cli.main import main  # noqa: E402
from prgkit.demo.digits import CLASSES, load_digits  # noqa: E402
from prgkit.evaluate.compare.diswot import (  # noqa: E402
    candidates,
    class_activations,
    correlations,
    dissimilarity,
    proof,
    rank_correlation,
    ranking_notes,
)
from prgkit.evaluate.compare.schema import Measured, RankCorrelation, RankedStudent, Ranking, Spread  # noqa: E402


def test_three_images_by_hand() -> None:
    teacher = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # the first two are the same to it
    student = torch.tensor([[2.0, 1.0, 0.0]] * 3)  # all three are the same to the student
    labels = torch.tensor([0, 0, 1])
    samples, activations = dissimilarity(student, teacher, labels, 2)
    # Rows [1 1 0]/√2, twice, and [0 0 1] against [1 1 1]/√3.
    assert samples == pytest.approx((2 * (2 - 2 * math.sqrt(2 / 3)) + 2 - 2 / math.sqrt(3)) / 3)
    # The classes' gradients are -(2, -1)/6 and its opposite to the teacher, and minus and plus one vector to the
    # student: rows [1 -1]/√2 on both sides.
    assert activations == pytest.approx(0)
    # With a third class that no image shows they are (-4, 1)/9 and (2, -2)/9 to the teacher, and (-2, -1)/9 and
    # (1, -1)/9 to a student that takes the last two for the same: rows [17 -10], [-10 8] and [5 -1], [-1 2].
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    expected = (2 - 2 * 95 / math.sqrt(26 * 389) + 2 - 2 * 26 / math.sqrt(5 * 164)) / 2
    assert dissimilarity(student, teacher, labels, 3)[1] == pytest.approx(expected)


def test_a_rotated_teacher_is_the_best_student_and_no_order_of_images_changes_a_score() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(24, 8, generator=generator)
    other = torch.randn(24, 5, generator=generator).relu()
    labels = torch.randint(0, 4, (24,), generator=generator)
    rotation = torch.linalg.qr(torch.randn(16, 8, generator=generator)).Q  # [16, 8], orthonormal columns
    assert dissimilarity(3 * teacher @ rotation.T, teacher, labels, 10) == pytest.approx((0, 0), abs=1e-9)
    order = torch.randperm(24, generator=generator)
    score = dissimilarity(other, teacher, labels, 10)
    assert min(score) > 0.1
    assert dissimilarity(other[order], teacher[order], labels[order], 10) == pytest.approx(score)
    assert dissimilarity(other[order], teacher, labels, 10) != pytest.approx(score)


def test_class_activations_are_the_gradient_of_an_untrained_head() -> None:
    features = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([2, 0, 2, 4, 4, 4])
    head = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.cross_entropy(features @ head.T, labels).backward()
    assert head.grad is not None
    torch.testing.assert_close(class_activations(features, labels, 5), head.grad[[0, 2, 4]])


def test_rank_correlations_by_hand() -> None:
    # Ranks 1 2 3 4 against 2 1 4 3: rho = 1 - 6*4/(4*15), and four pairs of six agree.
    found = rank_correlation([1, 2, 3, 4], [20, 10, 40, 30])
    assert (found.spearman, found.kendall) == pytest.approx((0.6, 1 / 3))
    # A tie shares its ranks: 1.5 1.5 3 against 1 2 3.
    found = rank_correlation([5, 5, 9], [1, 2, 3])
    assert (found.spearman, found.kendall) == pytest.approx((math.sqrt(3) / 2, 2 / math.sqrt(6)))
    assert rank_correlation([1, 1], [1, 2]) == RankCorrelation(spearman=None, kendall=None)


def test_what_chance_gives_is_what_all_orders_give() -> None:
    """The bound that a table names lies where the shares of all n! orders pass one in twenty."""
    assert proof(4) == "4 students prove nothing: chance alone gives any order."
    assert proof(6) == "Of 6 students, chance alone gives a Spearman beyond ±0.88 one time in twenty."
    places = range(6)
    found = [abs(rank_correlation(places, order).spearman or 0) for order in itertools.permutations(places)]
    shares = [sum(rho >= bound for rho in found) / len(found) for bound in (0.82, 0.88)]
    assert shares[0] > 0.05 > shares[1]


def test_distances_count_downwards_and_students_that_are_not_trained_do_not_count() -> None:
    def spread(mean: float) -> Spread:
        return Spread(mean=mean, deviation=None, values=[mean])

    rows = [
        RankedStudent(
            student=f"student {distance}",
            score=spread(-distance),
            relations=spread(distance),
            semantics=spread(1.0),
            by_batch=[],
            parameters=100 * distance,
            macs=distance,
            measured=spread(50 - distance) if distance < 5 else None,
        )
        for distance in (1, 2, 3, 4, 5)
    ]
    found = correlations(rows)
    assert {name: both.spearman for name, both in found.items()} == pytest.approx(
        {"score": 1, "relations": 1, "semantics": None, "parameters": -1, "macs": -1}
    )
    told = ranking_notes(
        Ranking(
            teacher="t",
            image_size=32,
            seeds=[0],
            batches=[8],
            measured=Measured(label="prg", of="top1"),
            rows=rows,
            correlations=found,
            command="prgkit",
        )
    )
    assert "measured top-1 of prg (Spearman, Kendall; 4 students): score +1.00, +1.00; " in told[1]
    assert "semantics alone –, –" in told[1]
    assert told[2].startswith("4 students prove nothing")


def test_the_command_line_ranks_first_and_then_says_how_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for number, image in enumerate(load_digits("train")[0][:48]):
        image.save(f"photos/{number:02}.png")
    Path("tiny.yaml").write_text(f"""\
# Distil a few pictures, to rank students.
data: {{images: photos, classes: [{", ".join(CLASSES)}], prompts: ["the digit {{}}"], held_out: 0.2}}
teacher: {{model: "demo:digits", batch_size: 16}}
views: {{count: 1, flip: false}}
student: {{model: test_efficientnet, image_size: 32}}
objective: {{name: ce}}
training: {{epochs: 1, batch_size: 16, workers: 0, precision: fp32}}
""")

    def call(line: str) -> str:
        monkeypatch.setattr(sys, "argv", ["prgkit", *shlex.split(line)])
        capsys.readouterr()
        main()
        return capsys.readouterr().out

    line = "compare tiny.yaml --objectives ce --students test_efficientnet,test_resnet --out ranked"
    said = call(f"{line} --rank-students")
    assert os.listdir("ranked") == ["rank.json"]  # nothing was trained
    assert "2 untrained students at 32 px, 4 initialisations, 1 batch of" in said
    assert "None of these students is trained here yet" in said
    before = json.loads(Path("ranked/rank.json").read_text())
    assert before["rows"][0]["score"]["mean"] > before["rows"][1]["score"]["mean"]
    call(line)
    said = call(f"{line} --rank-students")
    assert "agreement %" in said
    assert "2 students prove nothing" in said
    after = json.loads(Path("ranked/rank.json").read_text())
    scores = [[(row["student"], row["score"], row["macs"]) for row in one["rows"]] for one in (before, after)]
    assert scores[0] == scores[1]  # a function of the recipe alone
    compared = {row["student"]: row["agreement"] for row in json.loads(Path("ranked/compare.json").read_text())["rows"]}
    assert {row["student"]: row["measured"] for row in after["rows"]} == compared


def test_the_recipes_own_student_is_ranked_among_the_families() -> None:
    assert candidates("resnet18")[:2] == ["resnet18", "repvit_m0_9"]
    assert candidates("repvit_m1_1").count("repvit_m1_1") == 1
