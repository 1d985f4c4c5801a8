"""PRG and its peers against numbers worked out by hand or by numpy."""

import math
import socket
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prgkit import objectives as losses
from prgkit.config import objectives
from prgkit.objectives import Objectives, build_loss
from prgkit.objectives.dho import DHO
from prgkit.objectives.features.crd import CRD
from prgkit.objectives.features.nd import ND
from prgkit.objectives.features.ofa import OFA, enhanced
from prgkit.objectives.features.rkd import RKD, angles, distances
from prgkit.objectives.logits.ce import CE
from prgkit.objectives.logits.dist import DIST
from prgkit.objectives.logits.dkd import DKD, decoupled
from prgkit.objectives.logits.kd import KD
from prgkit.objectives.logits.pld import PLD
from prgkit.objectives.prg import PRG, correlate, nodes, pearson
from prgkit.outputs import LossContext, StudentOutput, TeacherOutput
from prgkit.teacher.zero_shot import prompt_logits, weighted_logits

BATCH, CLASSES, WIDTH = 12, 4, 6
SPACE = LossContext(
    classes=CLASSES,
    width=WIDTH,
    epochs=10,
    steps_per_epoch=3,
    images=BATCH,
    class_means=lambda: torch.ones(CLASSES, WIDTH),
    class_vectors=F.normalize(torch.eye(CLASSES, WIDTH) + 0.5, dim=1),
    logit_scale=10.0,
    stages=lambda: (3, 5),
    class_features=lambda: iter(torch.randn(CLASSES, 20, WIDTH, generator=torch.Generator().manual_seed(0))),
    words=(torch.eye(2, WIDTH), torch.eye(1, WIDTH)),
)
ONE = torch.tensor([0])  # a batch of the first image
CEPage, KDPage, PRGPage = objectives.CE, objectives.KD, objectives.PRG


def sides(seed: int = 0, classes: int = CLASSES) -> tuple[StudentOutput, TeacherOutput]:
    generator = torch.Generator().manual_seed(seed)
    student = StudentOutput(
        torch.randn(BATCH, WIDTH, generator=generator, requires_grad=True),
        torch.randn(BATCH, classes, generator=generator, requires_grad=True),
        tuple(torch.randn(BATCH, width, side, side, generator=generator) for width, side in ((3, 4), (5, 2))),
    )
    features = F.normalize(torch.randn(BATCH, WIDTH, generator=generator), dim=1)
    logits = 5 * torch.randn(BATCH, classes, generator=generator)
    return student, TeacherOutput(features, logits, logits.argmax(dim=1), torch.arange(BATCH))


def prg(**changes: object) -> PRG:
    return PRG(PRGPage(name="prg", **changes), SPACE)  # type: ignore[arg-type]


def test_prompt_logits_are_scaled_cosines() -> None:
    features = torch.tensor([[0.6, 0.8]])
    prompts = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.8, 0.6], [-1.0, 0.0]]])  # 2 templates, 2 classes
    torch.testing.assert_close(prompt_logits(features, prompts, 10.0), torch.tensor([[[6.0, 8.0], [9.6, -6.0]]]))


def test_max_weighting_by_hand() -> None:
    logits = torch.tensor([[[6.0, 8.0], [2.0, -6.0]]])  # the templates' maxima are 8 and 2: weights 0.8 and 0.2
    torch.testing.assert_close(weighted_logits(logits, "max"), torch.tensor([[5.2, 5.2]]))
    torch.testing.assert_close(weighted_logits(logits, "mean"), torch.tensor([[4.0, 1.0]]))
    share = 1 / (1 + math.exp(-6))
    expected = torch.tensor([[6 * share + 2 * (1 - share), 8 * share - 6 * (1 - share)]])
    torch.testing.assert_close(weighted_logits(logits, "softmax"), expected)


def test_max_weighting_of_negative_maxima_is_finite_and_uniform() -> None:
    logits = torch.tensor([[[-1.0, -3.0], [-2.0, -5.0]], [[-1.0, -3.0], [2.0, 1.0]]])
    expected = torch.tensor([[-1.5, -4.0], [2.0, 1.0]])  # alike where all are negative, else the positive one alone
    torch.testing.assert_close(weighted_logits(logits, "max"), expected)


@pytest.mark.parametrize("weighting", ["max", "mean", "softmax"])
def test_one_template_changes_nothing_and_their_order_does_not_matter(weighting: str) -> None:
    logits = torch.randn(5, 3, 7)
    assert torch.equal(weighted_logits(logits[:, :1], weighting), logits[:, 0])
    torch.testing.assert_close(weighted_logits(logits[:, [2, 0, 1]], weighting), weighted_logits(logits, weighting))


def test_pearson_is_numpys_and_ignores_scale_and_shift() -> None:
    first, second = torch.randn(5, 9, dtype=torch.float64), torch.randn(5, 9, dtype=torch.float64)
    expected = [np.corrcoef(a, b)[0, 1] for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    np.testing.assert_allclose(pearson(first, second), expected, rtol=1e-12)
    np.testing.assert_allclose(pearson(3 * first + 7, 0.5 * second - 2), expected, rtol=1e-12)
    np.testing.assert_allclose(correlate(first, second), np.corrcoef(first, second)[:5, 5:], rtol=1e-10)


def test_nodes_by_hand() -> None:
    features, logits = torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, math.log(3)]])
    torch.testing.assert_close(nodes(features, logits, "softmax"), torch.tensor([[0.6, 0.8, 0.25, 0.75]]))
    torch.testing.assert_close(nodes(features, logits, "raw"), torch.tensor([[3.0, 4.0, 0.0, math.log(3)]]))
    torch.testing.assert_close(nodes(features, logits, "zscore"), torch.tensor([[-1.0, 1.0, -1.0, 1.0]]))
    half = math.sqrt(0.5)
    torch.testing.assert_close(nodes(features, logits, "l2"), torch.tensor([[-half, half, -half, half]]))


def test_raw_edges_say_nothing_and_softmax_edges_tell_classes_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(20, 64, generator=generator), dim=1)
    labels = torch.arange(200) % 20
    features = F.normalize(centres[labels] + 0.08 * torch.randn(200, 64, generator=generator), dim=1)
    gap = {}
    for block in ("raw", "softmax"):
        side = nodes(features, 100 * (0.2 * features @ centres.T + 0.15), block)
        proxies = torch.stack([side[labels == label].mean(0) for label in range(20)])
        edges = correlate(side, proxies)
        own = F.one_hot(labels, 20).bool()
        gap[block] = (edges[own].mean() - edges[~own].mean()).item()
    assert gap["raw"] < 0.15 < 0.5 < gap["softmax"]


def test_equal_graphs_cost_nothing() -> None:
    _, teacher = sides()
    terms = prg()(StudentOutput(*teacher[:2]), teacher)
    assert [terms[name].item() for name in ("supervision", "node", "edge")] == pytest.approx([0, 0, 0], abs=1e-6)


def test_the_loss_is_the_formula() -> None:
    student, teacher = sides()
    objective = prg(node_weight=3.0, edge_weight=2.0, proxy_momentum=0.0)
    terms = objective(student, teacher)

    def block(features: np.ndarray, logits: np.ndarray) -> np.ndarray:
        exponents = np.exp(logits - logits.max(1, keepdims=True))
        return np.hstack(
            [features / np.linalg.norm(features, axis=1, keepdims=True), exponents / exponents.sum(1, keepdims=True)]
        )

    ours, theirs = block(*(t.detach().numpy() for t in student[:2])), block(*(t.numpy() for t in teacher[:2]))
    labels = teacher.labels.numpy()
    present = [c for c in range(CLASSES) if (labels == c).any()]
    rows = range(BATCH)

    def edges(side: np.ndarray) -> np.ndarray:
        proxies = [side[labels == c].mean(0) for c in present]
        return np.array([[np.corrcoef(side[i], proxy)[0, 1] for proxy in proxies] for i in rows])

    node = 3 * np.mean([1 - np.corrcoef(ours[i], theirs[i])[0, 1] for i in rows])
    edge = 2 * np.mean((edges(ours) - edges(theirs)) ** 2)
    assert terms["node"].item() == pytest.approx(node, rel=1e-4)
    assert terms["edge"].item() == pytest.approx(edge, rel=1e-3)


def test_proxies_follow_their_class_mean_and_the_unseen_stay() -> None:
    objective = prg(proxy_momentum=0.9)
    ones, labels = torch.ones(2, WIDTH + CLASSES), torch.tensor([1, 1])
    objective.update_proxies(ones, 2 * ones, labels)  # the first sight of class 1 starts at its mean
    objective.update_proxies(3 * ones, 4 * ones, labels)
    torch.testing.assert_close(objective.student_proxies[1], torch.full((WIDTH + CLASSES,), 0.9 * 1 + 0.1 * 3))
    torch.testing.assert_close(objective.teacher_proxies[1], torch.full((WIDTH + CLASSES,), 0.9 * 2 + 0.1 * 4))
    assert objective.seen.tolist() == [False, True, False, False]
    assert not objective.student_proxies[[0, 2, 3]].any()


def test_without_momentum_a_proxy_is_the_batch_mean() -> None:
    objective = prg(proxy_momentum=0.0)
    side, labels = torch.randn(6, WIDTH + CLASSES), torch.tensor([0, 0, 2, 2, 2, 3])
    for _ in range(2):
        objective.update_proxies(side, side, labels)
    torch.testing.assert_close(objective.student_proxies[2], side[2:5].mean(0))


def test_no_gradient_reaches_the_teacher_or_a_proxy() -> None:
    student, teacher = sides()
    features, logits = teacher.features.requires_grad_(), teacher.logits.requires_grad_()
    objective = prg()
    teacher = TeacherOutput(features.detach(), logits.detach(), teacher.labels, teacher.images)
    sum(objective(student, teacher).values()).backward()
    assert student.features.grad is not None
    assert student.features.grad.abs().sum() > 0
    assert features.grad is None
    assert logits.grad is None
    assert not any(buffer.requires_grad for buffer in objective.buffers())
    assert not list(objective.parameters())


def test_hard_supervision_is_cross_entropy_with_the_pseudo_label() -> None:
    student, teacher = sides()
    terms = prg(supervision="hard", node_weight=0.0, edge_weight=0.0)(student, teacher)
    assert terms["supervision"].item() == CE(CEPage(name="ce"), SPACE)(student, teacher)["ce"].item()
    assert terms["node"] == terms["edge"] == 0


def test_kd_by_hand() -> None:
    student = StudentOutput(torch.zeros(1, 1), torch.tensor([[0.0, 0.0]]))
    teacher = TeacherOutput(torch.zeros(1, 1), torch.tensor([[2 * math.log(3), 0.0]]), ONE, ONE)
    terms = KD(KDPage(name="kd", alpha=0.75, temperature=2.0), SPACE)(student, teacher)
    assert terms["ce"].item() == pytest.approx(0.25 * math.log(2))
    divergence = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # the softened teacher says 3 to 1
    assert terms["kl"].item() == pytest.approx(0.75 * 4 * divergence, rel=1e-6)


def test_a_weighted_list_adds_up_and_runs_in_float32() -> None:
    student, teacher = sides()
    both = Objectives([CEPage(name="ce", weight=2.0), KDPage(name="kd")], SPACE)
    terms = both(StudentOutput(student.features.bfloat16(), student.logits.bfloat16()), teacher)
    assert set(terms) == {"ce.ce", "kd.ce", "kd.kl"}
    assert all(term.dtype == torch.float32 for term in terms.values())
    rounded = F.cross_entropy(student.logits.bfloat16().float(), teacher.labels)
    torch.testing.assert_close(terms["ce.ce"], 2 * rounded)


def _rank(rank: int, port: int, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, out: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    objectives = prg(), crd_of(images=12)
    for batch in range(2):
        remember(*objectives, student, teacher, labels, slice(batch * 6 + rank * 3, batch * 6 + rank * 3 + 3))
    torch.save([one.state_dict() for one in objectives], f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def remember(
    prg: PRG, crd: CRD, student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, mine: slice
) -> None:
    """Give both objectives what they keep of a batch: proxies of nodes, and banks of two features of each image."""
    prg.update_proxies(student[mine], teacher[mine], labels[mine])
    side = TeacherOutput(teacher[mine], teacher[mine], labels[mine], torch.arange(12)[mine])
    crd.update_banks(student[mine, :2], teacher[mine, :2], side)


def test_two_processes_hold_the_proxies_and_banks_of_one(tmp_path) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 12, WIDTH + CLASSES, generator=generator)
    labels = torch.tensor([0, 1, 1, 2, 0, 0, 1, 1, 2, 2, 0, 2])
    alone = prg(), crd_of(images=12)
    for batch in range(2):
        remember(*alone, student, teacher, labels, slice(batch * 6, batch * 6 + 6))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(r, port, student, teacher, labels, str(tmp_path))) for r in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0
    for rank in range(2):
        together = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for mine, theirs in zip(alone, together, strict=True):
            for name, buffer in mine.state_dict().items():
                torch.testing.assert_close(theirs[name], buffer)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_every_objective_of_a_recipe_teaches_the_student_and_nothing_else(name: str) -> None:
    student, teacher = sides()
    config = objectives.OBJECTIVES[name](name=name)
    if config.learns_labels:
        student = student._replace(heads=(0.5 * student.logits, 2 * student.logits))
    if config.scores_by_text:
        student = student._replace(logits=F.normalize(student.features, dim=1) @ SPACE.class_vectors.T)
        student.logits.retain_grad()
    objective = Objectives([config], SPACE)
    terms = objective(student, teacher)
    torch.stack(list(terms.values())).sum().backward()
    gradient = student.logits.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    assert (student.features.grad is not None) == objective.uses_features


def test_every_config_has_its_loss_and_every_loss_its_config() -> None:
    files = [path.stem for path in Path(losses.__path__[0]).rglob("*.py") if path.stem != "__init__"]
    assert sorted(files) == sorted(objectives.OBJECTIVES)
    for name, config in objectives.OBJECTIVES.items():
        loss = build_loss(config(name=name), SPACE)  # type: ignore[arg-type, call-arg]
        assert type(loss).__name__ == config.__name__
        assert typing.get_type_hints(type(loss).__init__)["config"] is config
        assert isinstance(loss.uses_features, bool)


def test_dkd_by_hand() -> None:
    teacher, student = torch.tensor([[0.5, 0.25, 0.25]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    target, others = decoupled(student, teacher, torch.tensor([0]), 1.0)
    torch.testing.assert_close(target, torch.tensor([0.5 * math.log(2) + 0.5 * math.log(2 / 3)]))
    torch.testing.assert_close(others, torch.tensor([0.5 * math.log(1.5) + 0.5 * math.log(0.75)]))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_whose_other_classes_count_by_their_share_is_kd(temperature: float) -> None:
    student, teacher = sides()
    target, others = decoupled(student.logits, teacher.logits, teacher.labels, temperature)
    softened = teacher.logits / temperature
    share = softened.softmax(dim=1)[torch.arange(BATCH), teacher.labels]
    kl = F.kl_div((student.logits / temperature).log_softmax(1), softened.softmax(1), reduction="none").sum(dim=1)
    torch.testing.assert_close(target + (1 - share) * others, temperature**2 * kl)


@pytest.mark.parametrize("epochs", [None, 2.0])
def test_dkd_grows_to_its_full_weight_within_a_fifth_of_the_run_or_as_asked(epochs: float | None) -> None:
    student, teacher = sides()
    dkd = DKD(objectives.DKD(name="dkd", warmup_epochs=epochs), SPACE)  # of 10 epochs of 3 steps: 6 steps
    told = [dkd(student, teacher)["tckd"].item() for _ in range(8)]
    np.testing.assert_allclose(np.array(told) / told[-1], [1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1], rtol=1e-6)


def test_dist_asks_for_correlation_alone() -> None:
    student, teacher = sides()
    dist = DIST(objectives.DIST(name="dist", temperature=1.0), SPACE)
    equal = dist(StudentOutput(student.features, teacher.logits), teacher)
    torch.testing.assert_close(torch.stack([equal["inter"], equal["intra"]]), torch.zeros(2), atol=1e-6, rtol=0)
    halved = (0.5 * teacher.logits.softmax(dim=1) + 0.5 / CLASSES).log()  # other probabilities, correlated with them
    again = dist(StudentOutput(student.features, halved), teacher)
    torch.testing.assert_close(torch.stack([again["inter"], again["intra"]]), torch.zeros(2), atol=1e-6, rtol=0)


def test_dist_by_numpy() -> None:
    student, teacher = sides()
    terms = DIST(objectives.DIST(name="dist", inter_weight=2.0, intra_weight=3.0, temperature=2.0), SPACE)(
        student, teacher
    )
    answer, wanted = ((logits.detach() / 2).softmax(dim=1).numpy() for logits in (student.logits, teacher.logits))
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(answer, wanted, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(answer.T, wanted.T, strict=True)])
    assert terms["inter"].item() == pytest.approx(2 * 4 * rows, rel=1e-5)
    assert terms["intra"].item() == pytest.approx(3 * 4 * columns, rel=1e-5)


def test_rkd_by_hand() -> None:
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [6.0, 8.0]])  # on a line: 5, 10 and 5 apart, 20/3 in the mean
    torch.testing.assert_close(distances(features)[0], torch.tensor([0.0, 0.75, 1.5]))
    torch.testing.assert_close(angles(features)[1, 0], torch.tensor([1.0, 0.0, -1.0]))  # seen from the middle one
    corner = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    torch.testing.assert_close(angles(corner)[1, 0, 2], torch.tensor(0.0))


def test_rkd_does_not_change_when_features_are_turned_and_scaled() -> None:
    student, teacher = sides()
    turn, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH))
    rkd = RKD(objectives.RKD(name="rkd"), SPACE)
    before = rkd(student, teacher)
    after = rkd(StudentOutput(7 * student.features @ turn + 3, student.logits), teacher)
    for term in ("distance", "angle"):
        torch.testing.assert_close(before[term], after[term], rtol=1e-4, atol=1e-5)
    same = rkd(StudentOutput(2 * teacher.features, student.logits), teacher)
    torch.testing.assert_close(same["distance"] + same["angle"], torch.tensor(0.0), atol=1e-6, rtol=0)


def test_nd_by_hand() -> None:
    means = torch.tensor([[3.0, 4.0], [2.0, 0.0]])  # of unit length: (0.6, 0.8) and (1, 0)
    context = SPACE._replace(classes=2, width=2, class_means=lambda: means)
    labels = torch.tensor([0, 0, 1])
    teacher = TeacherOutput(torch.tensor([[0.0, 1.0]] * 3), torch.zeros(3, 2), labels, torch.arange(3))
    features = torch.tensor([[6.0, 8.0], [0.3, 0.4], [0.0, 9.0]])  # long and along; half as long; at a right angle
    terms = ND(objectives.ND(name="nd"), context)(StudentOutput(features, torch.zeros(3, 2)), teacher)
    assert terms["nd"].item() == pytest.approx((0 + 0.5 + 1) / 3)
    assert terms["kl"].item() == pytest.approx(0, abs=1e-7)
    assert terms["ce"].item() == pytest.approx(math.log(2))


def test_pld_by_hand_and_at_its_optimum() -> None:
    teacher = TeacherOutput(torch.zeros(1, 2), torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([1]), ONE)
    pld = PLD(objectives.PLD(name="pld", temperature=1.0), SPACE)

    def loss(logits: list[float]) -> float:
        return float(pld(StudentOutput(torch.zeros(1, 2), torch.tensor([logits])), teacher)["pld"])

    total = math.exp(2) + math.exp(1) + 1
    assert loss([0.0, 0.0, 0.0]) == pytest.approx((math.exp(2) * math.log(3) + math.exp(1) * math.log(2)) / total)
    assert loss([-100.0, 100.0, 0.0]) == pytest.approx(0, abs=1e-6)  # the teacher's order, without a doubt
    assert loss([0.0, 100.0, -100.0]) == pytest.approx(100 * math.exp(1) / total, rel=1e-5)  # the last two swapped


def test_ofa_by_hand() -> None:
    wanted = torch.tensor([[0.5, 0.25, 0.25]])
    teacher = TeacherOutput(torch.zeros(1, WIDTH), wanted.log(), ONE, ONE)
    flat, sure = torch.zeros(1, 3), torch.tensor([[0.8, 0.1, 0.1]]).log()
    config = objectives.OFA(name="ofa", gamma=2.0)  # weights: 1.5^2 - 1 of the label, 0.25^2 of the others
    assert enhanced(flat, teacher, config).item() == pytest.approx((1.25 + 2 * 0.0625) * math.log(3))
    assert enhanced(sure, teacher, config).item() == pytest.approx(-1.25 * math.log(0.8) - 2 * 0.0625 * math.log(0.1))
    plain = enhanced(sure, teacher, objectives.OFA(name="ofa"))  # gamma 1: cross-entropy with p_t itself
    torch.testing.assert_close(plain, F.cross_entropy(sure, wanted))


def test_ofa_teaches_an_exit_after_each_stage_and_resizes_its_maps() -> None:
    student, teacher = sides()
    ofa = OFA(objectives.OFA(name="ofa"), SPACE)
    terms = ofa(student, teacher)
    exits = [way(maps) for way, maps in zip(ofa.exits, student.stages, strict=True)]
    assert [tuple(one.shape) for one in exits] == [(BATCH, CLASSES)] * 2
    assert len(ofa.exits[0]) == 4 + 3  # one halving, then pooling, flattening and the classes
    assert len(ofa.exits[1]) == 3
    terms["exits"].backward()
    assert all(parameter.grad is not None for parameter in ofa.parameters())


def test_dho_by_hand() -> None:
    quarter, half = torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[0.5, 0.5]]).log()
    student = StudentOutput(torch.zeros(3, 2), half, heads=(quarter.expand(3, 2), half.expand(3, 2)))
    truth, numbers = torch.tensor([0, -1, 1]), torch.arange(3)
    teacher = TeacherOutput(torch.zeros(3, 2), half.expand(3, 2), torch.tensor([0, 0, 0]), numbers, truth)
    dho = DHO(objectives.DHO(name="dho"), SPACE)
    terms = dho(student, teacher)
    assert terms["ce"].item() == pytest.approx(-0.25 * (math.log(0.25) + math.log(0.75)))  # half the mean of two
    assert terms["kl"].item() == pytest.approx(0, abs=1e-7)
    sure = teacher._replace(logits=2 * quarter.expand(3, 2), truth=None)  # T = 2 takes the 2 away
    terms = dho(student, sure)
    assert terms["ce"].item() == 0
    kl = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert terms["kl"].item() == pytest.approx(0.5 * 4 * kl, rel=1e-5)


def crd_of(images: int, **config: object) -> CRD:
    """Return CRD whose heads leave features as they are, in a space of two dimensions; its banks are always the same."""
    torch.manual_seed(3)
    crd = CRD(objectives.CRD(name="crd", width=2, temperature=1.0, **config), SPACE._replace(width=2, images=images))  # type: ignore[arg-type]
    for head in (crd.student_head, crd.teacher_head):
        head.weight.data, head.bias.data = torch.eye(2), torch.zeros(2)
    return crd


def test_crd_by_hand() -> None:
    crd = crd_of(images=3, crd_weight=1.0)
    crd.student_bank[:] = crd.teacher_bank[:] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    student = StudentOutput(torch.tensor([[5.0, 0.0]]), torch.zeros(1, 2))  # of unit length: (1, 0)
    teacher = TeacherOutput(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), ONE, ONE)
    terms = crd(student, teacher)

    def nce(own: float, others: list[float]) -> float:
        density = np.mean(np.exp([own, *others]))  # Z: over all three images, which are all drawn
        noise = len(others) / 3  # K / N; the drawn ones but for the image itself
        odds = np.exp([own, *others]) / (3 * density) / noise
        return float(-np.log(odds[0] / (1 + odds[0])) - np.log(1 / (1 + odds[1:])).sum())

    assert terms["crd"].item() == pytest.approx(nce(1.0, [0.0, -1.0]) + nce(0.0, [1.0, 0.0]), rel=1e-5)
    half = math.sqrt(0.5)
    torch.testing.assert_close(crd.student_bank[0], torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(crd.teacher_bank[0], torch.tensor([half, half]))  # between (1, 0) and (0, 1)
    torch.testing.assert_close(crd.teacher_bank[1:], torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))


def test_crd_holds_no_image_against_another_with_its_pseudo_label() -> None:
    student = StudentOutput(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2))
    teacher = TeacherOutput(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), ONE, ONE)
    told = []
    for label in (0, 1):  # of the second image, as last seen; the first image's is 0
        crd = crd_of(images=2)
        crd.student_bank[:] = crd.teacher_bank[:] = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
        crd.labels[1] = label
        crd.partition[:] = 1.0
        told.append(crd(student, teacher)["crd"].item())
    assert told[0] < told[1]


@pytest.mark.parametrize(("name", "weight"), [("promptkd", 10.0), ("clipkd", 1.0)])
def test_class_vectors_are_shared(name: str, weight: float) -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    context = SPACE._replace(classes=2, width=2, class_vectors=vectors, logit_scale=2.0)
    part = build_loss(objectives.OBJECTIVES[name](name=name), context)
    teacher = TeacherOutput(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), ONE, ONE)  # 2 * <I, V> is 0 and 1.6
    shares = np.array([1, math.exp(1.6)]) / (1 + math.exp(1.6))
    terms = part(StudentOutput(torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2)), teacher)
    assert terms["kl"].item() == pytest.approx(weight * (shares * np.log(2 * shares)).sum(), rel=1e-5)
    alike = part(StudentOutput(torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 1.6]])), teacher)
    assert sum(term.item() for term in alike.values()) == pytest.approx(0, abs=1e-6)
    if name == "clipkd":
        assert terms["features"].item() == pytest.approx(2000 * (1 + 1) / 2)  # (1, 0) against (0, 1)
