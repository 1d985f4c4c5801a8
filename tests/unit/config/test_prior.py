"""targets.prior: a mapping, a file, or even; and what is wrong with one, said exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from prgkit.config.prior import class_shares, load_by_class
from prgkit.errors import RecipeError

CLASSES = ("ripe tomato", "leaf", "soil")
PRIOR = {"key": "targets.prior", "word": "even"}


@pytest.mark.parametrize(
    "text",
    [
        "ripe tomato,2\nleaf,1\nsoil,1\n",
        "class;share\nsoil;25 %\nleaf;25%\nripe tomato;50 %\n",
        "\ufeffclass\tcount\r\nleaf\t100\r\nsoil\t100\r\nripe tomato\t200\r\n",
    ],
)
def test_a_table_of_shares_or_counts_is_read_in_label_order(tmp_path: Path, text: str) -> None:
    (tmp_path / "shares.csv").write_text(text, encoding="utf-8")
    prior = load_by_class(str(tmp_path / "shares.csv"), CLASSES, **PRIOR)
    assert isinstance(prior, dict)
    assert list(prior) == list(CLASSES)
    assert class_shares(prior, CLASSES) == [0.5, 0.25, 0.25]


def test_a_class_that_never_comes_keeps_a_millionth() -> None:
    prior = load_by_class({"ripe tomato": 1.0, "leaf": 1e-50, "soil": 1.0}, CLASSES, **PRIOR)
    assert class_shares(prior, CLASSES) == pytest.approx([0.5, 1e-6, 0.5], rel=1e-5)


def test_names_are_compared_as_labels_are() -> None:
    classes = ("ripe tomato", "caf\u00e9")
    prior = load_by_class({"Ripe_Tomato": 3.0, "cafe\u0301": 1.0}, classes, **PRIOR)
    assert prior == {"ripe tomato": 3.0, "caf\u00e9": 1.0}
    with pytest.raises(RecipeError, match="'ripe tomato' stands twice"):
        load_by_class({"ripe_tomato": 3.0, "Ripe tomato": 1.0, "caf\u00e9": 1.0}, classes, **PRIOR)


def test_even_and_none_need_no_names() -> None:
    assert load_by_class("even", CLASSES, **PRIOR) == "even"
    assert class_shares("even", ("a", "b")) == [0.5, 0.5]
    assert class_shares(load_by_class(None, CLASSES, **PRIOR), CLASSES) is None


@pytest.mark.parametrize(
    ("prior", "said"),
    [
        ({"ripe tomato": 1.0, "leaf": 1.0, "soul": 1.0}, "no class is named 'soul'; did you mean 'soil'?"),
        ({"ripe tomato": 1.0}, "there is no figure of leaf, soil"),
        ("evn", "the figures cannot be read: No such file"),
        ("leaf,1\nsoil,-1\n", "'soil -1' is no class with a figure from 0 on"),
        ("leaf,1\nsoil,10 %\n", "some figures are percentages and some are not"),
        ({"ripe tomato": 0.0, "leaf": 0.0, "soil": 0.0}, "the figure of every class is 0"),
        ("leaf,1\nleaf,2\n", "'leaf' stands twice"),
        ("leaf,1\nsoil,nan\n", "'soil nan' is no class with a figure from 0 on"),
    ],
)
def test_what_is_wrong_with_a_prior_is_said(tmp_path: Path, prior: dict[str, float] | str, said: str) -> None:
    if isinstance(prior, str) and "," in prior:
        (tmp_path / "shares.csv").write_text(prior)
        prior = str(tmp_path / "shares.csv")
    with pytest.raises(RecipeError) as caught:
        load_by_class(prior, CLASSES, **PRIOR)
    assert str(caught.value).splitlines()[0].startswith(said)
