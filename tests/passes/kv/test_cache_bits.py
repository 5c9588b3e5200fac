"""Bits by layer: what a budget chooses, and that each layer gets what is given."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2]))

import tiny_decoders

from graphopt.api import canonical, optimize
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.text import TextDataset
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.save import save
from graphopt.passes.kv.cache_bits import WIDTHS, allocated, by_loss
from graphopt.passes.kv.quantize_kv import QuantizeKV
from graphopt.runtime_ops.generation import Generator

ASSUMED = ("no-left-padding", "counted-positions")
TEXT = TextDataset(np.random.default_rng(0).integers(0, 41, 64), 32)


def parsed(layers: int = 3, loud: int | None = None) -> ir.Model:
    """A decoder; the keys of the layer `loud` are large, so that errors of theirs cost much."""
    model = ir.from_proto(tiny_decoders.decoder("attention", layers=layers))
    if loud is not None:
        weight = model.graph.initializers[f"wk{loud}"]
        assert weight.const_value is not None
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(8), name=weight.name)
    return canonical(model)


def bits_of(model: ir.Model) -> list[tuple[int, int]]:
    return [
        (node.attributes["key_bits"].as_int(), node.attributes["value_bits"].as_int())
        for node in model.graph
        if node.op_type == "QuantizedKVAttention"
    ]


def quantized(model: ir.Model, **options: Any) -> tuple[ir.Model, dict[str, Any]]:
    recipe = {"passes": [{"quantize-kv": options}]}
    data = TEXT if QuantizeKV(**options).needs else None
    result = optimize(model, recipe, verify="none", assume=ASSUMED, calibration=data)
    return result.model, result.report.run.records[0].options


def test_layers_get_the_bits_that_are_given(tmp_path: Path) -> None:
    sites = {0: {"key_bits": 8, "value_bits": 2}, 2: {"value_bits": 3}}
    model, options = quantized(parsed(), key_bits=4, value_bits=4, sites=sites)
    assert bits_of(model) == [(8, 2), (4, 4), (4, 3)]
    assert options["sites"] == sites
    interface = kv_interface(model)
    assert interface is not None
    assert len({pair.shape for pair in interface.pairs if pair.part == "codes"}) == 3
    save(model, tmp_path / "model.onnx")
    for cache in ("growing", "static"):
        generator = Generator(tmp_path / "model.onnx", cache=cache)  # type: ignore[arg-type]
        assert len(generator.generate([[1, 2, 3]], max_new_tokens=50, stop=())[0]) == 50


@pytest.mark.parametrize("sensitivity", ["loss", "norms"])
def test_a_budget_is_spent_where_errors_cost_most(sensitivity: str) -> None:
    model, options = quantized(parsed(loud=1), budget=3.5, sensitivity=sensitivity)
    bits = bits_of(model)
    assert sum(map(sum, bits)) <= 3.5 * 6
    assert bits[1][0] == max(b for pair in bits for b in pair)
    again, _ = quantized(parsed(loud=1), sites=options["sites"])
    assert bits_of(again) == bits


def test_norms_take_no_data() -> None:
    assert not QuantizeKV(budget=4, sensitivity="norms").needs
    assert QuantizeKV(budget=4).needs


def test_trials_leave_the_model_as_it_is() -> None:
    model = parsed()
    before = [node.op_type for node in model.graph]
    interface = kv_interface(model)
    assert interface is not None
    found = by_loss(model, interface, Calibration(TEXT), 1)
    assert [node.op_type for node in model.graph] == before
    assert sorted(found) == [(layer, part) for layer in range(3) for part in ("key", "value")]
    assert all(alpha > 0 for alpha in found.values())


@given(st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=12), st.floats(2, 8))
def test_a_budget_holds_and_what_costs_more_gets_no_fewer_bits(costs: list[float], budget: float) -> None:
    found = allocated({(layer, "key"): cost for layer, cost in enumerate(costs)}, budget)
    bits = [found[layer]["key"] for layer in range(len(costs))]
    assert set(bits) <= set(WIDTHS)
    assert sum(bits) <= budget * len(bits) + 1e-6
    order = np.argsort(costs)
    if len(set(costs)) == len(costs) and min(costs) * 1.01 < max(costs):
        assert bits[order[-1]] >= bits[order[0]]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sites": {0: {"bits": 4}}}, "sites holds"), ({"sites": {0: {"key_bits": 5}}}, "sites holds"),
        ({"budget": 1}, "budget"), ({"budget": 4, "sensitivity": "other"}, "sensitivity"),
        ({"budget": 4, "operator": "contrib"}, "own operator"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        QuantizeKV(**options)
