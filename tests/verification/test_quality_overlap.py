"""Calibration and evaluation data share nothing: what does is refused, wherever its windows begin."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from graphopt.errors import InputDataError
from graphopt.models.texts import wikipedia
from graphopt.verification.quality.overlap import RUN, fingerprints, refuse_shared_samples, refuse_shared_text

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


RNG = np.random.default_rng(0)
CALIBRATION = RNG.integers(0, 1000, 5000)


def test_texts_of_their_own_are_taken() -> None:
    refuse_shared_text(RNG.integers(0, 1000, 5000), CALIBRATION)
    refuse_shared_text(RNG.integers(0, 2, 20), RNG.integers(2, 4, 5000))
    refuse_shared_text(np.zeros(0, np.int64), CALIBRATION)


@CALM
@given(st.integers(0, 5000 - RUN), st.integers(0, 700), st.integers(RUN, 300))
def test_a_shared_run_is_found_wherever_it_stands(begin: int, offset: int, length: int) -> None:
    own = np.random.default_rng(1).integers(1000, 2000, 1000)
    shared = CALIBRATION[begin : begin + length]
    own[offset : offset + len(shared)] = shared
    with pytest.raises(InputDataError, match=f"shares {len(shared):,} of its 1,000 tokens .* from token {offset} on"):
        refuse_shared_text(own, CALIBRATION)


def test_a_run_that_is_one_token_shorter_is_chance() -> None:
    own = np.full(1000, 5000)
    own[10 : 10 + RUN - 1] = CALIBRATION[100 : 100 + RUN - 1]
    refuse_shared_text(own, CALIBRATION)
    refuse_shared_text(own, CALIBRATION[100 : 100 + RUN])


def test_the_same_text_is_refused() -> None:
    with pytest.raises(InputDataError, match=r"shares 5,000 of its 5,000 tokens .* held out"):
        refuse_shared_text(CALIBRATION, CALIBRATION)
    with pytest.raises(InputDataError, match="shares 30 of its 30"):
        refuse_shared_text(CALIBRATION[50:80], CALIBRATION)  # shorter than a run


@pytest.mark.real
def test_the_two_texts_that_ship_share_nothing() -> None:
    texts = [np.frombuffer(wikipedia(split).encode("utf-32-le"), np.uint32) for split in ("evaluation", "calibration")]
    refuse_shared_text(*(text.astype(np.int64) for text in texts), run=120)


def test_samples() -> None:
    ours = [{"x": RNG.normal(size=(3, 4)), "scale": np.array(2.0)}]
    refuse_shared_samples(ours, [{"x": RNG.normal(size=(3, 4)), "scale": np.array(2.0)}])
    theirs = [{"x": np.concatenate([RNG.normal(size=(1, 4)), ours[0]["x"][1:]]), "scale": np.array(2.0)}]
    with pytest.raises(InputDataError, match="2 of the 3 samples to judge with were calibrated with"):
        refuse_shared_samples(ours, theirs)
    # The same numbers under another name, or in another shape, are other samples.
    refuse_shared_samples(ours, [{"y": ours[0]["x"]}])
    assert len(set(fingerprints({"x": np.zeros((2, 3))}) + fingerprints({"x": np.zeros((2, 4))}))) == 2
