"""merge-kv-heads: equal heads merge exactly, in any order, on many architectures; and what is left alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from test_share_kv import ASSUMED, Arrays, exported, fed, off, parsed, run

from graphopt.analysis.shapes import infer
from graphopt.api import optimize
from graphopt.calibration.text import TextDataset
from graphopt.graph.edits import sort
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.save import save
from graphopt.passes.kv.cached_layers import cached_layers
from graphopt.passes.kv.merge_kv_heads import MergeKVHeads
from graphopt.passes.kv.sharing_heal import place_of
from graphopt.passes.lower.cached_site import projection
from graphopt.runtime_ops.generation import Generator

ARCHITECTURES = ["llama", "mistral", "phi", "gemma2", "gptj", "opt", "nemotron", "starcoder2", "qwen2", "granite"]


def with_equal_heads(model: ir.Model, groups: list[list[int]]) -> ir.Model:
    """A copy in which the heads of each group of keys and values have the weights of its first one."""
    copy = model.clone()
    interface = kv_interface(copy)
    assert interface is not None
    facts = infer(copy, believe_names=True)
    source = {head: group[0] for group in groups for head in group}
    for layer in cached_layers(copy, interface, facts)[0].values():
        place = place_of(layer, facts)
        assert not isinstance(place, str)
        for operand in (place.site.k, place.site.v):
            product = projection(operand)
            if product is None:
                continue
            slots = [(product.node, 1)]
            if product.add is not None:
                slots.append((product.add, 1 - list(product.add.inputs).index(product.node.outputs[0])))
            for node, slot in slots:
                value = node.inputs[slot]
                assert value is not None
                assert value.const_value is not None
                array = value.const_value.numpy()
                heads = array.reshape(*array.shape[:-1], layer.kv_heads, -1)
                heads = heads[..., [source[head] for head in range(layer.kv_heads)], :]
                value.const_value = ir.tensor(heads.reshape(array.shape), name=value.name)
    return copy


def merged(model: ir.Model, **options: Any) -> tuple[ir.Model, MergeKVHeads]:
    after = model.clone()
    rule = MergeKVHeads(**options)
    rule(after)
    sort(after)
    return after, rule


def with_heads(feeds: Arrays, source: list[int]) -> Arrays:
    """Feeds in which the heads of each cache are those named."""
    return {k: v[:, source] if v.ndim == 4 else v for k, v in feeds.items()}


@pytest.mark.export
@pytest.mark.parametrize("key", ARCHITECTURES)
def test_equal_heads_merge_exactly(key: str, tmp_path: Path) -> None:
    model = exported(key)
    interface = kv_interface(model)
    assert interface is not None
    heads = interface.pairs[0].heads or 0
    equal = with_equal_heads(model, [list(range(heads))])
    after, rule = merged(equal)
    if heads == 1 or any(site.outcome == "left" for site in rule.sites):
        pytest.fail(f"nothing was merged: {rule.sites}")
    now = kv_interface(after)
    assert now is not None
    assert {pair.heads for pair in now.pairs} == {1}
    assert [(p.past, p.present) for p in now.pairs] == [(p.past, p.present) for p in interface.pairs]
    lowered = optimize(after.clone(), "lower", verify="none", assume=ASSUMED).model
    for past, tokens in ((0, 6), (5, 1)):
        feeds = fed(after, past, tokens)
        expected = run(equal, with_heads(feeds, [0] * heads))
        for one in (after, lowered):
            found = run(one, feeds)
            assert off({k: v for k, v in found.items() if v.ndim == 3}, expected) < 1e-5
            assert off({k: v for k, v in found.items() if v.ndim == 4},
                       {k: v[:, :1] for k, v in expected.items() if v.ndim == 4}) < 1e-5  # fmt: skip
    save(lowered, tmp_path / "model.onnx")
    assert len(Generator(tmp_path / "model.onnx").generate([[5, 6, 7]], max_new_tokens=5, stop=())[0]) == 5


def wide(layers: int = 2) -> ir.Model:
    """A decoder with four heads of keys and values for four of queries."""
    model = parsed(layers)
    for node in model.graph:
        if node.op_type == "Attention":
            node.attributes["kv_num_heads"] = ir.AttrInt64("kv_num_heads", 4)
    rng = np.random.default_rng(3)
    for name, value in model.graph.initializers.items():
        if name[:2] in ("wk", "wv"):
            value.const_value = ir.tensor(rng.normal(size=(64, 64)).astype(np.float32) * 0.15, name=name)
            value.shape = ir.Shape([64, 64])
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and len(value.shape) == 4:
            value.shape = ir.Shape([value.shape[0], 4, value.shape[2], 16])
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    return model


@settings(deadline=None, max_examples=6)
@given(st.permutations(range(4)))
def test_similar_heads_find_each_other(order: list[int]) -> None:
    """However equal heads are spread, they are merged with their like, and nothing changes."""
    equal = with_equal_heads(wide(1), [order[:2], order[2:]])
    after, _ = merged(equal, heads=2)
    feeds = fed(after, 0, 6)
    expected = run(equal, fed(equal, 0, 6))
    assert off({"logits": run(after, feeds)["logits"]}, expected) < 1e-5


def test_neighbours_are_merged_where_that_is_asked_for() -> None:
    model = wide()
    after, rule = merged(with_equal_heads(model, [[0, 1], [2, 3]]), heads=2, groups="contiguous")
    assert [site.outcome for site in rule.sites] == ["applied", "applied"]
    feeds = fed(after, 4, 3)
    expected = run(with_equal_heads(model, [[0, 1], [2, 3]]), with_heads(feeds, [0, 0, 1, 1]))
    found = run(after, feeds)
    assert off({"logits": found["logits"]}, expected) < 1e-5
    assert found["present.0.key"].shape == (2, 2, 7, 16)


def test_healing_makes_up_for_what_is_lost() -> None:
    text = TextDataset(np.random.default_rng(0).integers(0, 41, 32 * 40), 32)
    model = wide()
    plain, _ = merged(model, heads=2)
    recipe = {"passes": [{"merge-kv-heads": {"heads": 2, "heal": True, "samples": 40}}]}
    result = optimize(model.clone(), recipe, verify="none", calibration=text)
    feeds, cached = fed(model, 0, 32), fed(plain, 0, 32)
    expected = run(model, feeds)["logits"]
    lost = [float(np.square(run(one, cached)["logits"] - expected).sum()) for one in (plain, result.model)]
    assert lost[1] < 0.8 * lost[0]


def test_what_is_left_alone() -> None:
    _, rule = merged(wide(), heads=3)
    assert {site.detail for site in rule.sites} == {"its heads stay: 3 doesn't divide 4"}
    after, rule = merged(wide(), heads=2, keep=[1])
    assert len(rule.sites) == 1
    interface = kv_interface(after)
    assert interface is not None
    assert [pair.heads for pair in interface.pairs] == [2, 2, 4, 4]


@pytest.mark.parametrize(("options", "told"), [({"heads": 0}, "heads"), ({"groups": "random"}, "groups")])
def test_options_that_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        MergeKVHeads(**options)
