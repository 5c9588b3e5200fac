"""Photographs and rendered lines: sizes, splits, and what is said where Pillow is missing."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from graphopt.errors import UsageError
from graphopt.models.pictures import LINE_HEIGHT, PHOTOGRAPHS, photographs, text_lines


def test_splits_share_no_photograph() -> None:
    names = {split: {file.path for _, file in files} for split, files in PHOTOGRAPHS.items()}
    assert not names["evaluation"] & names["calibration"]
    # Two views of one scene are one photograph.
    scenes = [{name.rsplit("/", 1)[1].split("_")[0] for name in paths} for paths in names.values()]
    assert not scenes[0] & scenes[1]


def test_without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UsageError, match="pip install pillow"):
        photographs("evaluation", 32, 1)
    with pytest.raises(UsageError, match="pip install pillow"):
        text_lines("evaluation", 1)


@pytest.mark.real
def test_photographs_follow_the_seed() -> None:
    pytest.importorskip("PIL")
    found = photographs("evaluation", 64, 7)
    assert (found.shape, found.dtype) == ((7, 64, 64, 3), np.uint8)
    np.testing.assert_array_equal(found, photographs("evaluation", 64, 7))
    other = photographs("evaluation", 64, 7, seed=1)
    whole = len(PHOTOGRAPHS["evaluation"])
    np.testing.assert_array_equal(found[:whole], other[:whole])
    assert (found[whole:] != other[whole:]).any()


@pytest.mark.real
def test_lines() -> None:
    pytest.importorskip("PIL")
    lines = text_lines("calibration", 3)
    for text, picture in lines:
        assert 3 <= len(text.split()) < 7
        assert picture.shape[0] == LINE_HEIGHT
        assert picture.shape[1] > 60
        assert int(picture.max()) - int(picture.min()) > 100
    assert [text for text, _ in lines] == [text for text, _ in text_lines("calibration", 3)]
