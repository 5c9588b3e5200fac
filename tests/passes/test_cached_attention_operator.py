"""cached-attention: GroupQueryAttention becomes graphopt's operator, equal in text and numbers, in one buffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_decoders import decoder

from graphopt import Generator, session
from graphopt.analysis.attention_sites import AttentionSite, attention_sites
from graphopt.analysis.cost import cost
from graphopt.analysis.shapes import infer
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.passes.lower.cached_attention_operator import CachedAttention
from graphopt.passes.lower.skip_rms_norm import SkipRmsNorm

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]


def lowered(proto: onnx.ModelProto) -> tuple[ir.Model, CachedAttention]:
    model = ir.from_proto(proto)
    rule = CachedAttention()
    rule.call(model)
    assert not CachedAttention().call(model).modified
    onnx.checker.check_model(ir.to_proto(model))
    return model, rule


def own_sites(model: ir.Model) -> list[AttentionSite]:
    return [site for site in attention_sites(model, infer(model)) if site.operator == "CachedAttention"]


def operators_of(model: ir.Model) -> set[str]:
    return {node.op_type for node in model.graph}


@pytest.mark.parametrize("kwargs", [{}, {"rotary": False}, {"rotary": False, "positions": True, "dtype": "float16"}])
def test_the_same_text(tmp_path: Path, kwargs: dict[str, Any]) -> None:
    before = decoder("group-query", **kwargs)
    model, rule = lowered(before)
    assert [site.detail for site in rule.sites] == ["became CachedAttention: 4 heads on 2"] * 2
    onnx.save(before, tmp_path / "before.onnx")
    save(model, tmp_path / "after.onnx")
    expected = Generator(tmp_path / "before.onnx").generate(PROMPTS, max_new_tokens=8)
    assert Generator(tmp_path / "after.onnx").cache == "static"
    for cache in ("static", "growing"):
        generator = Generator(tmp_path / "after.onnx", cache=cache)  # type: ignore[arg-type]
        assert generator.generate(PROMPTS, max_new_tokens=8) == expected
        # A batch in pieces, which GroupQueryAttention refuses.
        pair = [PROMPTS[0], PROMPTS[0][::-1]]
        pieces = generator.generate(pair, max_new_tokens=4, chunk=2)
        assert pieces == Generator(tmp_path / "before.onnx").generate(pair, max_new_tokens=4)


def test_the_same_numbers_with_the_kernel_and_without(tmp_path: Path) -> None:
    before = decoder("group-query")
    model, _ = lowered(before)
    onnx.save(before, tmp_path / "before.onnx")
    save(model, tmp_path / "after.onnx")
    rng = np.random.default_rng(0)
    past = {f"past_key_values.{i}.{part}": rng.normal(size=(2, 2, 6, 16)) for i in (0, 1) for part in ("key", "value")}
    feeds = {"input_ids": np.array([[3], [9]]), "attention_mask": np.ones((2, 7), np.int64)}
    feeds |= {name: array.astype(np.float32) for name, array in past.items()}
    expected = session(tmp_path / "before.onnx").run(None, feeds)
    for kernels in (True, False):
        found = session(tmp_path / "after.onnx", kernels=kernels).run(None, feeds)
        for have, want in zip(found, expected, strict=True):
            np.testing.assert_allclose(have, want, atol=2e-5)


def test_analyses_know_it() -> None:
    model, _ = lowered(decoder("group-query"))
    interface = kv_interface(model)
    assert interface is not None
    assert interface.shared_buffer
    assert interface.mask_values
    assert {(pair.operator, pair.layout, pair.heads, pair.head_size) for pair in interface.pairs} == {
        ("CachedAttention", "BHSD", 2, 16)
    }
    facts = infer(model)
    sites = own_sites(model)
    assert [(s.operator, s.heads, s.kv_heads, s.head_size, s.rotary, s.cached, s.masked) for s in sites] == [
        ("CachedAttention", 4, 2, 16, True, True, True)
    ] * 2
    node = sites[0].node
    shapes = [facts.shape(value) or () for value in node.outputs]
    assert [[dim.value for dim in shape] for shape in shapes] == [[None, None, 64], *[[None, 2, None, 16]] * 2]
    costs = cost(model, dims={"batch": 1, "sequence": 1, "total": 8, "past": 7}).per_node
    assert [entry.flops for entry in costs if entry.node.op_type == "CachedAttention"] == [4 * 4 * 16 * 8] * 2


def test_packed_projections_whose_depth_only_the_operator_tells() -> None:
    proto = decoder("group-query", layers=1)
    nodes = {node.output[0]: node for node in proto.graph.node}
    attention = nodes["a0"]
    join = onnx.helper.make_node("Concat", list(attention.input[:3]), ["qkv"], axis=2)
    attention.input[:3] = ["qkv", "", ""]
    place = list(proto.graph.node).index(attention)
    proto.graph.node.insert(place, join)
    model, _ = lowered(proto)
    interface = kv_interface(model)
    assert interface is not None
    assert {(pair.heads, pair.head_size) for pair in interface.pairs} == {(2, 16)}
    assert own_sites(model) == []  # it has no queries, keys and values of their own


def edited(change: str) -> onnx.ModelProto:
    proto = decoder("group-query", layers=1)
    node = next(node for node in proto.graph.node if node.op_type == "GroupQueryAttention")
    match change:
        case "bias":
            node.input.extend(["", "bias"])
            proto.graph.input.append(onnx.helper.make_tensor_value_info("bias", 1, ["batch", 1, "sequence", "total"]))
        case "window":
            node.attribute.append(onnx.helper.make_attribute("local_window_size", 0))
        case "softmax":
            node.attribute.append(onnx.helper.make_attribute("smooth_softmax", 1))
        case "cache":
            for value in (*proto.graph.input, *proto.graph.output):
                if value.name.startswith(("past", "present")):
                    value.type.tensor_type.elem_type = onnx.TensorProto.INT8
        case "opset":
            proto.opset_import[0].version = 17
        case "table":
            del node.input[7:]
    return proto


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("bias", "it has a bias"),
        ("window", "its window is empty"),
        ("softmax", "it has smooth_softmax"),
        ("cache", "its cache is of type INT8"),
        ("opset", "needs opset 18"),
        ("table", "it rotates without tables"),
    ],
)
def test_left(change: str, told: str) -> None:
    model = ir.from_proto(edited(change))
    rule = CachedAttention()
    assert not rule.call(model).modified
    assert [told in site.detail for site in rule.sites] == [True], rule.sites


def test_without_the_library_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_LIBRARY", "")
    rule = CachedAttention()
    assert not rule.call(ir.from_proto(decoder("group-query"))).modified
    assert ["isn't built" in site.detail for site in rule.sites] == [True, True]


def test_a_decoder_lowered_so_is_one_lowered_for_generation() -> None:
    model, _ = lowered(decoder("group-query"))
    rule = SkipRmsNorm(decoders=True)
    rule.call(model)
    assert rule._everywhere
    assert operators_of(model) >= {"CachedAttention"}


def test_a_window_and_a_cap(tmp_path: Path) -> None:
    proto = decoder("group-query")
    for node in proto.graph.node:
        if node.op_type == "GroupQueryAttention":
            values = {"local_window_size": 3, "softcap": 4.0, "scale": 0.3}
            node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in values.items())
    model, _ = lowered(proto)
    onnx.save(proto, tmp_path / "before.onnx")
    save(model, tmp_path / "after.onnx")
    assert load(tmp_path / "after.onnx").functions
    expected = Generator(tmp_path / "before.onnx").generate(PROMPTS[:1], max_new_tokens=8)
    assert Generator(tmp_path / "after.onnx").generate(PROMPTS[:1], max_new_tokens=8) == expected
