"""Methods on real weights, each against its own objective: rsq, llm-int8, auto, and all widths of the grids."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from smollm2_layers import calibration, first_layers, token_ids
from smollm2_matrices import mean_error, some_rows

from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.linear_sites import linear_sites
from graphopt.analysis.shapes import infer
from graphopt.api import optimize
from graphopt.calibration.request import Request, TokenWeights
from graphopt.calibration.statistics import SecondMoment
from graphopt.passes.quantize.codebook_grids import normal_float_grid, power_grid
from graphopt.passes.quantize.gptq import gptq
from graphopt.passes.quantize.grids import Grid, UniformGrid
from graphopt.passes.quantize.roundings import objective, round_to_nearest
from graphopt.passes.quantize.site_weights import weight_rows
from graphopt.runtime_ops.memory_session import make_session

pytestmark = pytest.mark.real


def logits(model: ir.Model) -> np.ndarray:
    found: np.ndarray = make_session(model.clone(), threads=1).run(None, token_ids(0))[0]
    return found.astype(np.float64)


def divergence(original: ir.Model, model: ir.Model) -> float:
    """The mean KL(original ‖ model), in nats."""
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (logits(original), logits(model)))
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def made(model: ir.Model, recipe: str) -> ir.Model:
    data = None if recipe == "int8-dynamic" else calibration()
    return optimize(model.clone(), recipe, verify="none", calibration=data).model


def weight_bytes(model: ir.Model) -> int:
    return sum(v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rsq_lowers_the_error_of_tokens_that_are_looked_at(bits: int) -> None:
    """Each moment matrix gives the weight that is best by itself; the tokens that count are few."""
    model = first_layers()
    attention = attention_sites(model, infer(model))
    site = next(site for site in linear_sites(model, attention) if site.weight.name == "attn_v1")
    assert site.x is not None
    node = next(a.node for a in attention if a.node.outputs[0].name == "a1")
    requests = [Request(site.x, SecondMoment(), weights) for weights in (None, TokenWeights(node, "linear"))]
    found = calibration(8).gather(model, requests)
    plain, looked_at = (found[request].array for request in requests)
    rows, grid = weight_rows(site), UniformGrid(bits, symmetric=False, search=True)
    nearest = round_to_nearest(rows, grid, 32)
    by_all, by_received = (gptq(rows, grid, 32, moments) for moments in (plain, looked_at))
    assert objective(rows, by_received, looked_at) < objective(rows, by_all, looked_at)
    assert objective(rows, by_all, plain) < objective(rows, by_received, plain)
    assert objective(rows, by_received, looked_at) < 0.8 * objective(rows, nearest, looked_at)


def test_llm_int8_keeps_what_outliers_would_leave_no_codes_for() -> None:
    original = first_layers()
    apart, plain = (divergence(original, made(original, recipe)) for recipe in ("llm-int8", "int8-dynamic"))
    assert apart < 0.8 * plain


def test_auto_loses_less_than_equal_bits_of_its_size() -> None:
    """By its own measure, with the bytes of gptq in 3 bits and groups of 128.

    Of a model without a cache that is the squared error of its outputs, in parts of their square. Without the rotation
    of the recipe `auto`, whose matrices are a tenth of so small a model.
    """
    original = first_layers(1)
    sizes = {"bits": 3, "group_size": 128, "symmetric": False, "rounding": "gptq", "head_bits": 4}

    def written(name: str, options: dict[str, object]) -> ir.Model:
        recipe = {"passes": [{"recipe": "canonical"}, "fold-norm-affine", {name: options}]}
        # Of fewer tokens than features GPTQ learns by heart, and what it leaves of their errors says nothing of others.
        return optimize(original.clone(), recipe, verify="none", calibration=calibration(32)).model

    equal = written("quantize-weights", sizes)
    auto = written("allocate-bits", {"budget": f"{weight_bytes(equal) / 1e6}MB"})
    assert weight_bytes(auto) < 1.02 * weight_bytes(equal)
    wanted = logits(original)
    of_equal, of_auto = (float(np.square(logits(m) - wanted).sum() / np.square(wanted).sum()) for m in (equal, auto))
    assert of_auto < 0.9 * of_equal


WIDTHS: dict[str, list[Grid]] = {
    "symmetric": [UniformGrid(bits) for bits in range(2, 9)],
    "integers": [UniformGrid(bits, symmetric=False) for bits in range(2, 9)],
    "floats": [UniformGrid(bits, symmetric=False, floats=True) for bits in range(2, 9)],
    "normal floats": [normal_float_grid(bits) for bits in range(2, 9)],
    "powers": [power_grid(bits) for bits in range(2, 9)],
}


@pytest.mark.parametrize("name", WIDTHS)
def test_each_bit_lowers_the_squared_error(name: str) -> None:
    """To a quarter, but of normal floats: as many levels lie where hardly a number does, so that the widest steps, far
    out, hardly become narrower."""
    weights = some_rows()
    errors = [
        mean_error(
            weights, {n: round_to_nearest(w, grid.for_weight(w, 32), 32).dequantized() for n, w in weights.items()}
        )
        for grid in WIDTHS[name]
    ]
    ratios = np.array(errors[1:]) / np.array(errors[:-1])
    if name == "normal floats":
        assert (ratios < 0.6).all(), ratios
    else:
        assert (ratios[1:] < 0.3).all(), ratios
        assert ratios[0] < 0.45, ratios
