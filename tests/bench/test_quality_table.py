"""What is made of a quality measurement: intervals, fronts, the choice, and files that read back."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[2] / "bench" / "quality"))

from picture import picture
from table import COSTS, MARGIN, Row, choose, difference, front, table, wilson


def row(policy: str, hits: str, forwards: int, cache: str = "none", model: str = "m") -> Row:
    n = len(hits)
    counts = (forwards,) * n
    return Row(model, policy, "blockwise", cache, hits, "1" * n, counts, (3,) * n, (), forwards * n)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_is_of_the_shares_that_the_count_does_not_contradict(
    case: tuple[int, int],
) -> None:
    """Its ends are where the observed share is 1.96 standard errors of the assumed one away."""
    right, count = case
    for end in wilson(right, count):
        error = math.sqrt(max(end * (1 - end), 0.0) / count)
        assert math.isclose(abs(right / count - end), 1.96 * error, abs_tol=1e-6)


def test_a_difference_is_paired() -> None:
    """The same questions right, in the same places: no doubt. In others: doubt."""
    hits = "01" * 50
    assert difference([(row("a", hits, 1), row("b", hits, 2))]) == (0.0, 0.0, 0.0)
    mean, low, high = difference([(row("a", hits, 1), row("b", "10" * 50, 2))])
    assert mean == 0 and low < -0.1 and high > 0.1
    mean, low, high = difference([(row("a", "0" * 100, 1), row("b", "0" * 75 + "1" * 25, 1))])
    error = math.sqrt(0.25 * 0.75 / 100)
    assert mean == 0.25
    assert low == pytest.approx(0.25 - 1.96 * error, abs=0.02)
    assert high == pytest.approx(0.25 + 1.96 * error, abs=0.02)


@given(st.lists(st.tuples(st.integers(0, 8), st.integers(1, 6)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    rows = [row("p", "1" * right + "0" * (8 - right), cost) for right, cost in points]
    best = {(each.right, each.forwards[0]) for each in front(rows, COSTS["NFE"])}
    beaten = {
        (right, cost)
        for right, cost in points
        if any(r >= right and c <= cost and (r, c) != (right, cost) for r, c in points)
    }
    assert best == set(points) - beaten


def test_the_cheapest_that_every_model_bears_is_chosen() -> None:
    good, bad = "1" * 90 + "0" * 10, "1" * 70 + "0" * 30
    models = {
        name: [
            row("steps", good, 32, model=name),
            row("sure", good, 16, model=name),
            row("hasty", good if name == "a" else bad, 4, model=name),
            row("sure", good, 12, "dual", model=name),
        ]
        for name in "ab"
    }
    assert choose(models, "NFE", reuse=False) == ("sure", "blockwise", "none")
    assert choose(models, "NFE", reuse=True) == ("sure", "blockwise", "dual")
    only = {"a": models["a"]}
    assert choose(only, "rows", reuse=True) == ("hasty", "blockwise", "none")
    assert 0 < MARGIN < 0.2


def test_tables_pictures_and_files(tmp_path: Path) -> None:
    draw = np.random.default_rng(2)
    rows = [
        row(policy, "".join(draw.choice(["0", "1"], 20)), cost, cache, model)
        for model in ("one", "two")
        for policy, cost in (("steps 16", 32), ("threshold 0.9", 9), ("credit 0.9", 7))
        for cache in ("none", "dual")
    ]
    rows[0] = Row(**{**vars(rows[0]), "texts": ("x",) * 20, "hits": "1" * 20})
    rows[6] = Row(**{**vars(rows[6]), "hits": "1" * 20})
    rows = [Row(**{**vars(each), "seconds": 1.0}) for each in rows]
    (tmp_path / "rows.json").write_text(Row.written(rows))
    assert Row.read(tmp_path / "rows.json") == rows
    text = table(rows)
    for part in ("one: 20 questions", "threshold 0.9", "chosen by", "caches against none"):
        assert part in text
    picture(rows, tmp_path / "picture")
    first = (tmp_path / "picture.svg").read_bytes()
    picture(rows, tmp_path / "picture")
    assert (tmp_path / "picture.svg").read_bytes() == first and b"canvas" in first
