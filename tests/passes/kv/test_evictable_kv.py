"""evictable-kv: nothing changes while all tokens are there, each layer forgets by itself, and it tells what matters."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import test_share_kv
import tiny_decoders
from exactness import assert_exact
from test_share_kv import exported, run

from graphopt.api import canonical, optimize, verify
from graphopt.graph.assumptions import Assumptions
from graphopt.graph.edits import Editor
from graphopt.graph.importance import read_importance
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.kv_names import rename_kv_cache
from graphopt.graph.save import save
from graphopt.passes.kv.evictable_kv import EvictableKV
from graphopt.runtime_ops.eviction import Eviction
from graphopt.runtime_ops.generation import Generator

Arrays = dict[str, npt.NDArray[Any]]
ASSUMED = ("no-left-padding", "no-batched-chunks", "counted-positions", "max-length=64")
ALL = {
    "llama": [0, 1], "mistral": [], "qwen3": [0, 1], "gemma2": [1], "phi3": [0, 1], "gpt2": [0, 1], "gptneox": [0, 1],
    "gptj": [0, 1], "opt": [0, 1], "gptbigcode": [0, 1],
}  # fmt: skip
"""The layers of each architecture whose caches may lose tokens: those without a window."""


def parsed(kind: Any = "attention", layers: int = 2, **more: Any) -> ir.Model:
    model = ir.from_proto(tiny_decoders.decoder(kind, layers=layers, **more))
    canonical(model)
    return model


def prepared(model: ir.Model, *recipe: Any, assume: tuple[str, ...] = ASSUMED, **options: Any) -> ir.Model:
    """A copy after the pass and what follows, verified with what is given."""
    passes = [{"evictable-kv": options}, *({"recipe": name} for name in recipe)]
    result = optimize(model.clone(), {"passes": passes}, assume=assume)
    assert all(record.status != "rolled back" for record in result.report.run.records)
    return result.model


def fed(model: ir.Model, past: int, tokens: int, batch: int = 1) -> Arrays:
    """Inputs of a decoder, with another cache in each layer."""
    return test_share_kv.fed(model, past, tokens, batch, alike=False)


def without(model: ir.Model, feeds: Arrays, places: list[int], layers: list[int]) -> Arrays:
    """`feeds` with places gone from the caches of layers."""
    interface = kv_interface(model)
    assert interface is not None
    gone = {pair.past: np.delete(feeds[pair.past], places, axis=2) for pair in interface.pairs if pair.layer in layers}
    return {**feeds, **gone}


def hidden(model: ir.Model, feeds: Arrays, places: list[int]) -> Arrays:
    """`feeds` with places hidden from all layers by the attention mask."""
    interface = kv_interface(model)
    assert interface is not None
    assert interface.attention_mask is not None
    mask = feeds[interface.attention_mask].copy()
    mask[:, places] = 0
    return {**feeds, interface.attention_mask: mask}


@pytest.mark.export
@pytest.mark.parametrize("key", ALL)
def test_a_cache_without_some_tokens_is_one_where_they_are_hidden(key: str, tmp_path: Path) -> None:
    model = exported(key)
    after = prepared(model)
    told = read_importance(after.metadata_props)
    assert (list(told.outputs) if told is not None else []) == ALL[key]
    if told is None:
        return
    lowered = prepared(model, "lower")
    assert sum(node.op_type == "GroupQueryAttention" for node in lowered.graph) == 2
    for past, tokens in ((0, 6), (5, 1), (4, 3)):
        feeds = fed(model, past, tokens)
        expected, found = run(model, feeds), run(after, feeds)
        assert all(np.array_equal(found[name], expected[name]) for name in expected)
    # What a window doesn't reach may be hidden from the layers that have one.
    feeds, gone = fed(model, 11, 2), [1, 2, 5]
    expected = run(model, hidden(model, feeds, gone))["logits"]
    for one in (after, lowered):
        found = run(one, without(model, feeds, gone, ALL[key]))["logits"]
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    save(lowered, tmp_path / "model.onnx")
    save(model, tmp_path / "original.onnx")
    generators = [Generator(tmp_path / f"{name}.onnx") for name in ("original", "model")]
    prompts = [list(range(3, 23)), list(range(23, 43))]
    texts = [generator.generate(prompts, max_new_tokens=8, stop=()) for generator in generators]
    assert texts[0] == texts[1]
    kept = Eviction(9, "prefix", recent=4, sinks=1, every=3)
    assert len(generators[1].generate(prompts, max_new_tokens=8, stop=(), eviction=kept)[1]) == 8


def test_it_is_exact_and_done_once() -> None:
    def alone(model: ir.Model) -> Any:
        count, rule = len(model.graph.outputs), EvictableKV()
        rule.assumptions = Assumptions(ASSUMED)
        result = rule(model)
        if result.modified:
            onnx.checker.check_model(ir.to_proto(model), full_check=True)
            model.graph.outputs[:] = list(model.graph.outputs)[:count]
        return result

    # A hidden score is −10000 before and −∞ after, which is the same to a softmax.
    model = parsed()
    for past in (0, 5):
        assert_exact(model, alone, feeds=fed(model, past, 3, batch=2), seeds=1)


@pytest.mark.parametrize("recipe", [(), ("lower",), ("lower+decode",)])
def test_layers_forget_by_themselves(recipe: tuple[str, ...]) -> None:
    """One layer of three has lost tokens: as where a mask of that layer alone hides them."""
    model = parsed(layers=3)
    after = prepared(model, *recipe)
    feeds, gone = fed(model, 9, 2), [0, 3, 4]
    reference = model.clone()
    attentions = [node for node in reference.graph if node.op_type == "Attention"]
    edit = Editor(reference)
    edit.at(attentions[1])
    row = np.zeros(11, dtype=np.float32)
    row[gone] = -1e4
    mask = attentions[1].inputs[3]
    attentions[1].replace_input_with(3, edit.op("Add", [mask, edit.constant(row, "gone")]))
    expected = run(reference, feeds)["logits"]
    found = run(after, without(model, feeds, gone, [1]))
    assert np.abs(found["logits"] - expected).max() < 1e-5 * np.abs(expected).max()
    assert [found[f"present.{layer}.key"].shape[2] for layer in range(3)] == [11, 8, 11]


@pytest.mark.parametrize("recipe", [(), ("lower",), ("lower+decode",)])
@pytest.mark.parametrize(("past", "tokens"), [(0, 7), (6, 1), (5, 2)])
def test_importance_is_the_attention_of_the_last_queries(recipe: tuple[str, ...], past: int, tokens: int) -> None:
    model = parsed()
    reference = model.clone()
    for index, node in enumerate([node for node in reference.graph if node.op_type == "Attention"]):
        node.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", 3)
        node.resize_outputs(4)
        node.outputs[3].name, node.outputs[3].type = f"weights.{index}", ir.TensorType(ir.DataType.FLOAT)
        reference.graph.outputs.append(node.outputs[3])
    after = prepared(model, *recipe, window=3)
    feeds = fed(model, past, tokens)
    expected, found = run(reference, feeds), run(after, {**feeds, "importance": np.array(True)})
    for layer in range(2):
        weights = expected[f"weights.{layer}"][:, :, -3:]
        pooled = weights.reshape(1, 2, 2, -1, past + tokens).sum(3).mean(2)
        np.testing.assert_allclose(found[f"importance.{layer}"], pooled, atol=1e-5)
        assert run(after, feeds)[f"importance.{layer}"].shape == (1, 2, 0)


def test_a_cap_and_a_scale_count() -> None:
    """The output is checked against the weights that the operator itself gives out."""
    model = parsed()
    for node in model.graph:
        if node.op_type == "Attention":
            for name, number in (("softcap", 0.7), ("scale", 0.9)):
                node.attributes[name] = ir.AttrFloat32(name, number)
    after = prepared(model)
    reference = model.clone()
    first = next(node for node in reference.graph if node.op_type == "Attention")
    first.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", 3)
    first.resize_outputs(4)
    first.outputs[3].name, first.outputs[3].type = "weights", ir.TensorType(ir.DataType.FLOAT)
    reference.graph.outputs.append(first.outputs[3])
    feeds = fed(model, 4, 3)
    pooled = run(reference, feeds)["weights"].reshape(1, 2, 2, 3, 7).sum(3).mean(2)
    found = run(after, {**feeds, "importance": np.array(True)})["importance.0"]
    np.testing.assert_allclose(found, pooled, atol=1e-5)


def counted_by_cache(*, mask: bool) -> ir.Model:
    """A decoder that takes the lengths of its caches for positions; without `mask` it has no attention mask."""
    model = ir.from_proto(tiny_decoders.decoder("attention", positions=True))
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    edit = Editor(model)
    edit.at(graph[0])

    def size(name: str, axis: int) -> ir.Value:
        length = edit.op("Shape", [inputs[name]], {"start": axis, "end": axis + 1})
        return edit.op("Squeeze", [length, edit.constant(np.array([0]), "first")])

    past, new = size("past_key_values.1.value", 2), size("input_ids", 1)
    one = edit.constant(np.array(1), "one")
    places = edit.op("Range", [past, edit.op("Add", [past, new]), one])
    edit.replace(inputs["position_ids"], edit.op("Unsqueeze", [places, edit.constant(np.array([0]), "first")]))
    graph.inputs.remove(inputs["position_ids"])
    if not mask:
        for node in graph:
            if node.op_type == "Attention":
                node.replace_input_with(3, None)
                node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
        graph.inputs.remove(inputs["attention_mask"])
        for node in reversed(list(graph)):
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                graph.remove(node, safe=True)
    canonical(model)
    return model


@pytest.mark.parametrize("recipe", [(), ("lower",)])
def test_positions_are_counted_in_the_mask_and_not_in_a_cache(recipe: tuple[str, ...]) -> None:
    by_input, by_cache = parsed(positions=True), counted_by_cache(mask=True)
    after = prepared(by_cache, *recipe)
    feeds, gone = fed(by_input, 9, 2), [1, 2]
    expected = run(by_input, hidden(by_input, feeds, gone))["logits"]
    found = run(after, without(by_cache, feeds, gone, [0, 1]))["logits"]
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def left(model: ir.Model, assume: tuple[str, ...] = ASSUMED) -> list[str]:
    """What the pass says of sites that it leaves."""
    rule = EvictableKV()
    rule.assumptions = Assumptions(assume)
    rule(model.clone())
    return [site.detail for site in rule.sites if site.outcome == "left"]


def test_what_is_left_says_why() -> None:
    assert all("positions are counted by its length" in told for told in left(counted_by_cache(mask=False)))
    assert len(left(counted_by_cache(mask=False))) == 2
    assert left(parsed(), ()) == ["its cache stays whole: rows may be padded on the left: --assume no-left-padding"] * 2
    shared = optimize(parsed(), {"passes": [{"share-kv": {"pairs": [[1, 0]]}}]}, verify="none").model
    assert left(shared) == ["its cache stays whole: its keys or values are read by Attention besides"]
    fixed = parsed()
    for value in fixed.graph.inputs:
        if "past" in (value.name or ""):
            value.shape = ir.Shape(["batch", 2, 7, 16])
    assert left(fixed) == ["its cache stays whole: its length is fixed"] * 2
    biased = parsed()
    for node in biased.graph:
        if node.op_type == "Attention":
            edit = Editor(biased)
            edit.at(node)
            bias = edit.constant(np.ones((1, 4, 1, 1), dtype=np.float32), "bias")
            node.replace_input_with(3, edit.op("Add", [node.inputs[3], bias]))
    assert all("depends on the places of the keys" in told for told in left(biased))
    assert left(ir.from_proto(tiny_decoders.decoder("group-query"))) == [
        "its cache stays whole: its cache is joined by GroupQueryAttention, not by Attention"
    ] * 2  # fmt: skip


def test_the_interface_stays_readable() -> None:
    model = parsed()
    after = prepared(model)
    before, now = kv_interface(model), kv_interface(after)
    assert before is not None
    assert now is not None
    assert (now.problems, now.others, now.logits) == ((), (), "logits")
    assert [(p.past, p.present) for p in now.pairs] == [(p.past, p.present) for p in before.pairs]
    assert [p.shape[2] for p in now.pairs] == ["past_0", "past_0", "past_1", "past_1"]
    assert verify(model, after).ok
    assert verify(after, after).ok
    assert verify(after, model).ok
    quantized = optimize(after.clone(), {"passes": ["quantize-kv"]}, verify="none", assume=ASSUMED)
    details = {site.detail for site in quantized.report.run.records[0].sites}
    assert all("is read by a" in detail for detail in details), details


def test_a_model_without_a_cache_is_left() -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 23]> g (float[2] x) => (float[2] y) { y = Neg(x) }')
    assert not EvictableKV()(model).modified
    with pytest.raises(ValueError, match="at least one query"):
        EvictableKV(window=0)


def test_other_names_change_nothing(tmp_path: Path) -> None:
    """Layers keep their numbers where a cache is called otherwise."""
    model = prepared(parsed(names="in.{}.{} out.{}.{}"))
    prompt, eviction = [list(range(1, 31))], Eviction(12, "prefix", recent=4, sinks=1)
    texts = []
    for name in ("before", "after"):
        save(model, tmp_path / f"{name}.onnx")
        texts.append(
            Generator(tmp_path / f"{name}.onnx").generate(prompt, max_new_tokens=8, stop=(), eviction=eviction)
        )
        rename_kv_cache(model)
    assert texts[0] == texts[1]
    assert "present.0.key" in [value.name for value in model.graph.outputs]


def whole_first(count: int) -> ir.Model:
    """Four layers, of which the first `count` have a bias in their mask, so that their caches stay whole."""
    model = parsed(layers=4)
    for node in [node for node in model.graph if node.op_type == "Attention"][:count]:
        edit = Editor(model)
        edit.at(node)
        bias = edit.constant(np.ones((1, 4, 1, 1), dtype=np.float32), "bias")
        node.replace_input_with(3, edit.op("Add", [node.inputs[3], bias]))
    return model


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    "gone", [["attention.1"], ["attention.0", "attention.1"], ["attention.3"], ["attention.0", "attention.2"]]
)
def test_layers_that_go_afterwards_take_what_they_tell_along(first: int, gone: list[str], tmp_path: Path) -> None:
    drop, evict = {"drop-layers": {"branches": gone}}, {"evictable-kv": {}}
    found, expected = (
        optimize(whole_first(first), {"passes": passes}, assume=ASSUMED, verify="none").model
        for passes in ([evict, drop], [drop, evict])
    )
    told = read_importance(found.metadata_props)
    assert told is not None
    assert told == read_importance(expected.metadata_props)
    assert {*told.outputs.values(), "logits"} <= {value.name for value in found.graph.outputs}
    feeds = {**fed(found, 6, 2), "importance": np.array(True)}
    one, other = run(found, feeds), run(expected, feeds)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6)
    save(found, tmp_path / "model.onnx")
    generator = Generator(tmp_path / "model.onnx")
    kept = Eviction(12, "prefix", recent=4, sinks=1)
    assert len(generator.generate([list(range(1, 31))], max_new_tokens=8, stop=(), eviction=kept)[0]) == 8


def test_without_the_last_layer_that_may_lose_tokens_nothing_is_told() -> None:
    passes = [{"evictable-kv": {}}, {"drop-layers": {"branches": ["attention.3"]}}]
    found = optimize(whole_first(3), {"passes": passes}, assume=ASSUMED, verify="none").model
    assert read_importance(found.metadata_props) is None
    assert "importance" not in {value.name for value in found.graph.inputs}
    onnx.checker.check_model(ir.to_proto(found), full_check=True)


def test_layers_that_share_afterwards_leave_the_others_their_numbers() -> None:
    share, evict = {"share-kv": {"pairs": [[1, 0], [3, 2]]}}, {"evictable-kv": {}}
    result = optimize(whole_first(2), {"passes": [evict, share]}, assume=ASSUMED, verify="none")
    told = read_importance(result.model.metadata_props)
    assert told is not None
    assert dict(told.outputs) == {1: "importance.1", 2: "importance.2"}
    details = [site.detail for site in result.report.run.records[1].sites if site.outcome == "left"]
    assert details == ["tokens may be dropped from its cache or that of layer 2 alone (evictable-kv)"]
    feeds = {**fed(result.model, 6, 2), "importance": np.array(True)}
    lengths = [run(result.model, feeds)[f"importance.{layer}"].shape[2] for layer in (1, 2)]
    assert lengths == [8, 8]
