"""The objectives of other papers, and the options that came with them, where the right number is known."""

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from prgkit.config import objectives
from prgkit.objectives import build_loss
from prgkit.objectives.features.prototypes import nt_xent
from prgkit.objectives.features.sp import SP, similarities
from prgkit.objectives.logits.dkd import DKD
from prgkit.objectives.logits.kd import KD
from prgkit.objectives.logits.lelp import LELP, row_space, split_classes, subclass_directions
from prgkit.objectives.logits.taid import TAID
from prgkit.objectives.text.aspects import Aspects
from prgkit.outputs import StudentOutput, TeacherOutput, standardise_logits
from tests.unit.objectives.test_objectives import SPACE, sides

TWO = SPACE._replace(classes=2, width=2, class_vectors=torch.eye(2))
LN3, LN9 = math.log(3), math.log(9)


def side(features: list[list[float]], logits: list[list[float]]) -> tuple[StudentOutput, TeacherOutput]:
    """Return the same features and logits as a student's and as a teacher's."""
    told = torch.tensor(features), torch.tensor(logits)
    student = StudentOutput(told[0].clone().requires_grad_(), told[1].clone().requires_grad_())
    return student, TeacherOutput(*told, told[1].argmax(dim=1), torch.arange(len(features)))


# Logit standardisation.


def test_standardised_logits_by_hand() -> None:
    torch.testing.assert_close(standardise_logits(torch.tensor([[1.0, 0.0, -1.0]])), torch.tensor([[1.0, 0.0, -1.0]]))
    logits = torch.randn(4, 5)
    torch.testing.assert_close(standardise_logits(7 * logits + 3), standardise_logits(logits))
    torch.testing.assert_close(standardise_logits(logits).std(dim=1), torch.ones(4))
    half = math.sqrt(0.5)
    torch.testing.assert_close(standardise_logits(torch.tensor([[40.0, 1.0]])), torch.tensor([[half, -half]]))


def test_standardised_kd_by_hand() -> None:
    student, _ = side([[0.0, 0.0]], [[0.0, 1.0, -1.0]])
    _, teacher = side([[0.0, 0.0]], [[100.0, 0.0, -100.0]])
    published = objectives.KD(name="kd", standardise=True, alpha=1.0, temperature=2.0)
    assert KD(published, SPACE)(student, teacher)["kl"].item() == pytest.approx(0.398569, rel=1e-5)
    same = student._replace(logits=3 * teacher.logits + 5)
    assert KD(published, SPACE)(same, teacher)["kl"].item() == pytest.approx(0, abs=1e-6)
    decoupled = objectives.DKD(name="dkd", standardise=True, warmup_epochs=0.0)
    terms = DKD(decoupled, SPACE)(same, teacher)
    assert terms["tckd"].item() == pytest.approx(0, abs=1e-5)
    assert terms["nckd"].item() == pytest.approx(0, abs=1e-5)


def test_of_two_classes_standardised_logits_pass_no_gradient() -> None:
    student, _ = side([[0.0, 0.0]], [[1.0, 3.0]])
    _, teacher = side([[0.0, 0.0]], [[5.0, 1.0]])
    kl = KD(objectives.KD(name="kd", standardise=True, alpha=1.0, temperature=2.0), TWO)(student, teacher)["kl"]
    assert kl.item() / 4 == pytest.approx(0.240079, rel=1e-5)
    kl.backward()
    assert student.logits.grad is not None
    assert student.logits.grad.abs().max() < 1e-6
    assert objectives.KD(name="kd", standardise=True).fewest_classes == 3
    assert objectives.KD(name="kd").fewest_classes == 2


# TAID.


def taid(**changes: object) -> TAID:
    return TAID(objectives.TAID(name="taid", **changes), TWO)  # type: ignore[arg-type]


def test_taid_by_hand() -> None:
    student, _ = side([[0.0, 0.0]], [[0.0, 0.0]])
    _, teacher = side([[0.0, 0.0]], [[LN9, 0.0]])
    loss = taid(t_start=0.5)(student, teacher)["taid"]  # p_t is (0.75, 0.25)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    torch.testing.assert_close(student.logits.grad, torch.tensor([[-0.25, 0.25]]))


@pytest.mark.parametrize(("t", "wanted"), [(0.0, 0.0), (1.0, 0.4)])  # nothing to learn; all of KD at T = 1
def test_taid_begins_at_the_student_and_ends_at_the_teacher(t: float, wanted: float) -> None:
    student, _ = side([[0.0, 0.0]], [[0.0, 0.0]])
    _, teacher = side([[0.0, 0.0]], [[LN9, 0.0]])
    taid(t_start=t)(student, teacher)["taid"].backward()
    torch.testing.assert_close(student.logits.grad, torch.tensor([[-wanted, wanted]]))


def test_an_anneal_begins_at_even_odds_whatever_the_student_says() -> None:
    student, _ = side([[0.0, 0.0]], [[3.0, -2.0]])
    _, teacher = side([[0.0, 0.0]], [[LN9, 0.0]])
    loss = taid(start="uniform", t_start=0.5)(student, teacher)["taid"]
    assert loss.item() == pytest.approx(5 * 0.25 + math.log1p(math.exp(-5)), rel=1e-5)  # softmax(W / 2) is (0.75, 0.25)


@pytest.mark.parametrize(("steps", "wanted"), [(1000, 0.4006), (100_000, 0.40015008)])
def test_taid_moves_by_the_schedule_or_by_the_loss(steps: int, wanted: float) -> None:
    loss = taid(t_start=0.4)
    loss.steps_in_all = steps
    loss.update(torch.tensor(1.0))
    assert loss.t.item() == pytest.approx(0.4)
    loss.update(torch.tensor(0.9))
    assert loss.momentum.item() == pytest.approx(0.001, rel=1e-4)
    assert loss.t.item() == pytest.approx(wanted, abs=1e-7)


def test_taids_t_never_falls_and_stops_at_its_end() -> None:
    loss, before = taid(t_start=0.2, t_end=0.9), 0.0
    loss.steps_in_all = 50
    for step in range(80):
        loss.update(torch.tensor(1.0 + step))  # a loss that grows
        assert loss.t.item() >= before
        before = loss.t.item()
    assert before == pytest.approx(0.9)


# LELP.


def test_subclasses_split_a_class_by_hand() -> None:
    shares = split_classes(torch.tensor([[0.8, 0.2]]), torch.tensor([[[LN3, 0.0], [0.0, 0.0]]]))
    torch.testing.assert_close(shares, torch.tensor([[0.6, 0.2, 0.1, 0.1]]))


def test_projections_are_standardised_and_blind_to_class_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = F.normalize(torch.randn(3, 8, generator=generator), dim=1)
    mixing = torch.randn(8, 8, generator=generator)
    features = [torch.randn(400, 8, generator=generator) @ mixing + 3 * number for number in range(3)]
    directions, offsets = subclass_directions(features, vectors, 2)
    assert (directions.shape, offsets.shape) == ((3, 2, 8), (3, 2))
    torch.testing.assert_close(directions @ vectors.T, torch.zeros(3, 2, 3), atol=1e-5, rtol=0)
    for own, towards, offset in zip(features, directions, offsets, strict=True):
        projections = own @ towards.T - offset
        torch.testing.assert_close(projections.mean(dim=0), torch.zeros(2), atol=1e-4, rtol=0)
        assert projections.square().mean().item() == pytest.approx(1, rel=1e-3)  # over both directions


def test_a_class_of_one_direction_or_of_no_image_is_split_all_the_same() -> None:
    line = torch.linspace(-1, 1, 9)[:, None] * torch.eye(4)[3]
    directions, offsets = subclass_directions([line, torch.empty(0, 4)], torch.eye(2, 4), 2)
    assert directions.isfinite().all()
    assert offsets.isfinite().all()
    # Rotated by 45 degrees the one direction would be in both subclasses alike, and every share 1/2.
    assert not torch.allclose(directions[0] @ torch.eye(4)[3], torch.full((2,), float(directions[0, 0, 3])))


def test_as_many_classes_as_dimensions_leave_nothing_to_take_out() -> None:
    assert len(row_space(torch.eye(4, 4))) == 4
    assert len(row_space(torch.eye(2, 4).repeat(2, 1))) == 2  # a name twice is one direction
    directions, _ = subclass_directions([torch.randn(50, 4)] * 4, torch.eye(4, 4), 2)
    assert directions.abs().sum() > 0


def test_lelp_of_one_subclass_is_kd_with_the_same_targets() -> None:
    student, teacher = sides()
    lelp = LELP(objectives.LELP(name="lelp", subclasses=1), SPACE)
    terms = lelp(student, teacher)
    wanted = F.cross_entropy(lelp.head(student.features), teacher.logits.softmax(dim=1))
    torch.testing.assert_close(terms["subclasses"], wanted)
    terms["subclasses"].backward()
    assert lelp.head.weight.grad is not None


# Words that are no classes.


def ones() -> Iterator[torch.Tensor]:
    yield torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    yield torch.tensor([[0.0, 1.0]])


def test_an_aspect_is_a_contrast_or_a_standardised_cosine() -> None:
    pair = torch.tensor([[0.25, 0.0], [0.24, 0.0]])
    context = TWO._replace(logit_scale=100.0, words=(pair, torch.tensor([[0.0, 1.0]])), class_features=ones)
    aspects = Aspects(objectives.Aspects(name="aspects"), context)
    _, teacher = side([[1.0, 0.0]], [[0.0, 0.0]])
    shown = (teacher.features @ aspects.directions.T - aspects.offsets).sigmoid()
    assert shown[0, 0].item() == pytest.approx(0.731059, rel=1e-5)
    mean, deviation = 0.6, math.sqrt((0.36 + 0.04 + 0.16) / 3)  # of 0, 0.8 and 1
    assert shown[0, 1].item() == pytest.approx(1 / (1 + math.exp(mean / deviation)), rel=1e-5)


def test_aspects_by_hand() -> None:
    words = (torch.tensor([[LN3, 0.0], [0.0, 0.0]]),)
    context = TWO._replace(logit_scale=1.0, words=words, class_features=ones)
    aspects = Aspects(objectives.Aspects(name="aspects"), context)
    student, teacher = side([[1.0, 0.0]], [[0.0, 0.0]])  # a is 0.75
    for bias, wanted in ((0.0, math.log(2)), (LN3, 0.562335)):
        with torch.no_grad():
            aspects.head.weight.zero_()
            aspects.head.bias.fill_(bias)
        assert aspects(student, teacher)["aspects"].item() == pytest.approx(4 * wanted, rel=1e-5)


def test_vocabulary_of_the_classes_themselves_is_promptkd_and_of_one_word_nothing() -> None:
    student, teacher = sides()
    words = tuple(SPACE.class_vectors[:, None])
    alike = build_loss(
        objectives.Vocabulary(name="vocabulary", temperature=1.0, word_weight=10.0), SPACE._replace(words=words)
    )
    promptkd = build_loss(objectives.PromptKD(name="promptkd"), SPACE)
    scored = student._replace(logits=SPACE.logit_scale * F.normalize(student.features, dim=1) @ SPACE.class_vectors.T)
    torch.testing.assert_close(alike(student, teacher)["words"], promptkd(scored, teacher)["kl"])
    alone = build_loss(objectives.Vocabulary(name="vocabulary"), SPACE._replace(words=words[:1]))
    assert alone(student, teacher)["words"].item() == pytest.approx(0, abs=1e-6)


# Relations in the batch.


def test_sp_by_hand_and_blind_to_rotation() -> None:
    difference = similarities(torch.eye(2)) - similarities(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert difference.square().mean().item() == pytest.approx(0.292893, rel=1e-5)  # over B^2 pairs
    student, teacher = sides()
    turn, _ = torch.linalg.qr(torch.randn(teacher.features.shape[1], teacher.features.shape[1]))
    sp = SP(objectives.SP(name="sp"), SPACE)
    assert sp(student._replace(features=5 * teacher.features @ turn), teacher)["sp"].item() == pytest.approx(
        0, abs=1e-3
    )
    batch = student.features.repeat(6, 1)[:64], teacher.features.repeat(6, 1)[:64]
    whole = sp(
        StudentOutput(batch[0], torch.zeros(64, 4)),
        TeacherOutput(batch[1], torch.zeros(64, 4), torch.zeros(64, dtype=torch.long), torch.arange(64)),
    )
    published = 3000 / 64**2 * (similarities(batch[0]) - similarities(batch[1])).square().sum()
    torch.testing.assert_close(whole["sp"], published)


def test_prototypes_by_hand() -> None:
    assert nt_xent(torch.eye(2), torch.eye(2), 0.5, torch.ones(2, dtype=torch.bool)).item() == pytest.approx(
        0.239545, rel=1e-5
    )
    assert nt_xent(torch.eye(1, 2), torch.eye(1, 2), 0.5, torch.ones(1, dtype=torch.bool)).item() == 0
    four = torch.cat([torch.eye(2), torch.zeros(2, 2)]).requires_grad_()  # two of four classes are in the batch
    masked = nt_xent(four, four.detach(), 0.5, torch.tensor([True, True, False, False]))
    assert masked.item() == pytest.approx(0.239545, rel=1e-5)
    masked.backward()
    assert torch.isfinite(four.grad).all()
    student, teacher = side([[2.0, 0.0], [0.0, 3.0], [5.0, 0.0]], [[9.0, 0.0], [0.0, 9.0], [9.0, 0.0]])
    prototypes = build_loss(objectives.Prototypes(name="prototypes"), TWO._replace(classes=4))
    assert prototypes(student, teacher)["prototypes"].item() == pytest.approx(0.239545, rel=1e-5)


def test_clipkd_weighs_features_by_how_far_the_answers_are_apart() -> None:
    clipkd = build_loss(objectives.CLIPKD(name="clipkd", gap_weighted=True), TWO._replace(logit_scale=100.0))
    plain = build_loss(objectives.CLIPKD(name="clipkd"), TWO._replace(logit_scale=100.0))
    student, teacher = side([[0.0, 1.0]], [[0.0, 100.0]])
    teacher = teacher._replace(features=torch.tensor([[1.0, 0.0]]))
    apart = clipkd(student, teacher)["features"] / plain(student, teacher)["features"]
    assert apart.item() == pytest.approx(1 / (1 + math.exp(-math.sqrt(2))), rel=1e-5)  # sure, and of another class
    same = StudentOutput(student.features, torch.tensor([[100.0, 0.0]]))
    alike = clipkd(same, teacher)["features"] / plain(same, teacher)["features"]
    assert alike.item() == pytest.approx(0.5)
