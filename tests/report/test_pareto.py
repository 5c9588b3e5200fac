"""The plot of alternatives: its front, its scales, and that it is well-formed."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.errors import InputDataError
from graphopt.report.pareto import HEIGHT, WIDTH, Point, front, pareto_svg

NUMBERS = st.floats(1e-4, 1e4)
POINTS = st.lists(
    st.builds(Point, st.text("ab<&", min_size=1, max_size=3), st.sampled_from("xyz"), NUMBERS, NUMBERS),
    min_size=1,
    max_size=12,
)
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SVG = "{http://www.w3.org/2000/svg}"


@CALM
@given(POINTS)
def test_front(points: list[Point]) -> None:
    best = front(points)
    assert [p.cost for p in best] == sorted({p.cost for p in best})
    assert [p.loss for p in best] == sorted({p.loss for p in best}, reverse=True)
    for point in points:
        assert any(p.cost <= point.cost and p.loss <= point.loss for p in best)


@CALM
@given(POINTS, st.booleans())
def test_every_point_is_within_the_picture_and_told(points: list[Point], log: bool) -> None:
    root = ET.fromstring(pareto_svg(points, "MB", "KL", log=log, title="<a>"))
    assert root.find(f"{SVG}title").text == "<a>"  # type: ignore[union-attr]
    groups = root.findall(f"{SVG}g")
    assert len(groups) == len(points)
    for group, point in zip(groups, points, strict=True):
        assert group.find(f"{SVG}title").text.startswith(f"{point.label}: ")  # type: ignore[union-attr]
        for circle in group.findall(f"{SVG}circle"):
            assert 0 < float(circle.get("cx", "nan")) < WIDTH
            assert 0 < float(circle.get("cy", "nan")) < HEIGHT
    texts = [text.text for text in root.findall(f"{SVG}text")]
    assert {p.label for p in front(points)} <= set(texts)


def test_what_is_above_the_highest_has_an_arrow() -> None:
    points = [Point("good", "a", 10, 0.1), Point("broken", "b", 5, 1e5)]
    assert "↑" in pareto_svg(points, "MB", "KL", highest=10)
    assert "↑" not in pareto_svg(points, "MB", "KL")


@pytest.mark.parametrize("points", [[], [Point("a", "a", 1, 0)], [Point("a", "a", float("nan"), 1)]])
def test_numbers_that_can_t_be_drawn(points: list[Point]) -> None:
    with pytest.raises(InputDataError):
        pareto_svg(points, "MB", "KL")
