"""What GPTQ leaves of the error of rounding to nearest, on two layers of SmolLM2."""

from __future__ import annotations

import numpy as np
import pytest
from smollm2_layers import calibration, first_layers

from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.linear_sites import linear_sites
from graphopt.analysis.shapes import infer
from graphopt.calibration.request import Request
from graphopt.calibration.statistics import SecondMoment
from graphopt.passes.quantize.quantize_weights import TABLES
from graphopt.passes.quantize.rounding_gains import ROWS, rounding_gains
from graphopt.passes.quantize.roundings import objective
from graphopt.passes.quantize.setting import Setting
from graphopt.passes.quantize.site_weights import weight_rows
from graphopt.passes.quantize.token_weights import TokensOf


@pytest.mark.real
def test_some_rows_tell_what_the_whole_weight_gains() -> None:
    model, data = first_layers(2), calibration(8)
    sites = [site for site in linear_sites(model, attention_sites(model, infer(model))) if site.role not in TABLES]
    setting = Setting(4, 128, symmetric=False, rounding="gptq")
    gains = rounding_gains(model, sites, setting, data, TokensOf(model, [], "all", []))
    assert gains.keys() == {site.weight.name for site in sites}
    assert all(0 < gain < 1 for gain in gains.values())
    site = next(site for site in sites if site.weight.name == "attn_q1")
    assert site.x is not None
    request = Request(site.x, SecondMoment(), None)
    moments = data.gather(model, [request])[request].array
    rows = weight_rows(site)
    assert len(rows) > 2 * ROWS
    plain, better = (
        objective(rows, how.round(rows, moments).weight, moments)
        for how in (setting.with_options({"rounding": "nearest"}), setting)
    )
    assert gains["attn_q1"] == pytest.approx(better / plain, rel=0.2)
    assert np.mean(list(gains.values())) < 0.6
