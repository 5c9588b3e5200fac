"""The interface of a decoder, from files of any exporter, by dataflow."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_decoders import decoder
from tiny_transformers import exported_cached

from graphopt.graph.kv_interface import KVInterface, kv_interface
from graphopt.graph.load import load

OPTIMUM = "past_key_values.{}.{} present.{}.{}"
ARBITRARY = "in{}{} out{}{}"


def read(proto: onnx.ModelProto) -> KVInterface:
    found = kv_interface(ir.from_proto(proto))
    assert found is not None
    return found


def roles(found: KVInterface) -> tuple[str | None, ...]:
    return found.token_ids, found.attention_mask, found.position_ids, found.logits


@pytest.mark.parametrize("names", [OPTIMUM, ARBITRARY])
@pytest.mark.parametrize(
    ("kind", "layout", "operator"),
    [
        ("group-query", "BHSD", "GroupQueryAttention"),
        ("attention", "BHSD", "Attention"),
        ("concat", "BHSD", "Concat"),
        ("concat", "BSHD", "Concat"),
    ],
)
def test_forms_of_a_cache(kind, layout, operator, names) -> None:
    found = read(decoder(kind, layout=layout, names=names, positions=True, dtype="float16"))
    assert roles(found) == ("input_ids", "attention_mask", "position_ids", "logits")
    past, present = names.split()
    assert [(p.layer, p.part, p.past, p.present) for p in found.pairs] == [
        (i, part, past.format(i, part), present.format(i, part)) for i in range(2) for part in ("key", "value")
    ]
    assert {(p.layout, p.dtype, p.heads, p.head_size, p.operator) for p in found.pairs} == {
        (layout, "FLOAT16", 2, 16, operator)
    }
    assert found.shared_buffer == (kind == "group-query")
    assert found.vocabulary == 41
    assert found.problems == found.cross == found.others == ()
    assert not found.encoder_decoder
    assert json.loads(json.dumps(found.to_dict()))["layers"] == 2


def test_names_of_the_other_inputs_dont_matter() -> None:
    proto = decoder("concat", positions=True)
    names = {"input_ids": "a", "attention_mask": "b", "position_ids": "c", "logits": "d"}
    for value in (*proto.graph.input, *proto.graph.output):
        value.name = names.get(value.name, value.name)
    for node in proto.graph.node:
        node.input[:] = [names.get(n, n) for n in node.input]
        node.output[:] = [names.get(n, n) for n in node.output]
    assert roles(read(proto)) == ("a", "b", "c", "d")


@pytest.mark.parametrize("reshaped", [False, True])
def test_an_embedding_of_integers_that_a_head_has_in_blocks(reshaped: bool) -> None:
    proto = decoder("concat")
    (gather,) = (n for n in proto.graph.node if n.op_type == "Gather" and n.input[1] == "input_ids")
    (table,) = (t for t in proto.graph.initializer if t.name == gather.input[0])
    rows, size = table.dims
    gather.op_type, gather.domain = "GatherBlockQuantized", "com.microsoft"
    gather.input.append("scales")
    table.CopyFrom(onnx.numpy_helper.from_array(np.zeros((rows, 1, size), np.uint8), table.name))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((rows, 1, 1), np.float32), "scales"))
    if reshaped:
        shape = onnx.numpy_helper.from_array(np.array([rows, size]), "shape")
        proto.graph.initializer.append(shape)
        proto.graph.node.insert(0, onnx.helper.make_node("Reshape", [table.name, "shape"], ["table_rows"]))
        gather.input[0] = "table_rows"
    found = read(proto)
    assert found.token_ids == "input_ids"
    assert found.vocabulary == rows


def test_inputs_in_another_order_keep_their_layers() -> None:
    proto = decoder("concat", names=ARBITRARY, layers=3)
    inputs = list(proto.graph.input)
    del proto.graph.input[:]
    proto.graph.input.extend(reversed(inputs))
    assert [p.past for p in read(proto).pairs] == [f"in{i}{part}" for i in range(3) for part in ("key", "value")]


@pytest.mark.parametrize("where", ["past", "present"])
def test_whoever_asks_for_the_length_of_a_cache_keeps_it_from_being_shared(where: str) -> None:
    proto = decoder("group-query")
    name = {"past": "past_key_values.1.key", "present": "present.1.key"}[where]
    proto.graph.node.append(onnx.helper.make_node("Shape", [name], ["length"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("length", onnx.TensorProto.INT64, [4]))
    found = read(proto)
    assert [p.in_place for p in found.pairs] == [True, True, False, True]
    assert not found.shared_buffer


@pytest.mark.parametrize(("attributes", "index"), [({"end": 1}, None), ({}, 0), ({"start": -3}, 0)])
def test_whoever_asks_for_its_batch_or_heads_does_not(attributes, index) -> None:
    proto = decoder("group-query")
    proto.graph.node.append(onnx.helper.make_node("Shape", ["past_key_values.1.key"], ["of_cache"], **attributes))
    if index is None:
        proto.graph.node.append(onnx.helper.make_node("Identity", ["of_cache"], ["size"]))
    else:
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([index]), "index"))
        proto.graph.node.append(onnx.helper.make_node("Gather", ["of_cache", "index"], ["size"]))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("size", onnx.TensorProto.INT64, [1]))
    assert read(proto).shared_buffer
    if index is not None:
        proto.graph.initializer[-1].CopyFrom(
            onnx.numpy_helper.from_array(np.array([-2 if not attributes else 1]), "index")
        )
        assert not read(proto).shared_buffer


@pytest.mark.parametrize("read_as", ["length", "nothing"])
def test_a_mask_of_which_no_value_is_read(read_as: str) -> None:
    proto = decoder("group-query")
    for node in proto.graph.node:
        if node.op_type == "ReduceSum":
            # As a lowering writes it that takes rows to be padded at the end.
            node.op_type, node.input[:] = "Expand", ["wide", "rows_"]
            del node.attribute[:]
    first = next(i for i, n in enumerate(proto.graph.node) if n.op_type == "Expand")
    shape = onnx.helper.make_node("Shape", ["attention_mask"], ["rows_"], end=1)
    gather = next(n for n in proto.graph.node if "wide" in n.output)
    sizes = next(n for n in proto.graph.node if "sizes" in n.output)
    unit = next(n for n in proto.graph.node if "unit" in n.output)
    for node in (gather, sizes, unit):
        proto.graph.node.remove(node)
    for node in (shape, gather, sizes, unit):
        proto.graph.node.insert(first, node)
    if read_as == "nothing":
        proto.graph.input.append(onnx.helper.make_tensor_value_info("position_ids", onnx.TensorProto.INT64, ["b", "s"]))
    found = read(proto)
    assert (found.attention_mask, found.mask_values) == ("attention_mask", False)
    assert found.position_ids == ("position_ids" if read_as == "nothing" else None)
    assert found.others == ()


def test_a_model_without_a_cache() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[b, 4] x) => (float[b, 4] y) { y = Relu(x) }'
    assert kv_interface(ir.from_proto(onnx.parser.parse_model(text))) is None


def test_a_convolution_that_streams_has_no_cache_of_keys() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[b, 4, t] x, float[b, 4, 2] past) => (float[b, 4, t] y, float[b, 4, 2] present)
        <float[4, 4, 3] w> {
        joined = Concat<axis = 2>(past, x)
        y = Conv(joined, w)
        start = Constant<value_ints = [-2]>()
        end = Constant<value_ints = [9223372036854775807]>()
        axis = Constant<value_ints = [2]>()
        present = Slice(joined, start, end, axis)
    }"""
    assert kv_interface(ir.from_proto(onnx.parser.parse_model(text))) is None


SPELLED_OUT = """
    key = Concat<axis = 2>(past_k, new)
    value = Concat<axis = 2>(past_v, new)
    turned = Transpose<perm = [0, 1, 3, 2]>(key)
    scores = MatMul(q, turned)
    weights = Softmax(scores)
    y = MatMul(weights, value)
"""
CACHES = "float[b, 2, p, 8] past_k, float[b, 2, p, 8] past_v"
NEW = "float[b, 2, s, 8] q, float[b, 2, s, 8] new"


def test_a_window_cuts_the_present() -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]> g ({NEW}, {CACHES}) => (float[b, 2, s, 8] y, float[b, 2, w, 8] k, float[b, 2, t, 8] value) {{
        {SPELLED_OUT}
        start = Constant<value_ints = [-4]>()
        end = Constant<value_ints = [9223372036854775807]>()
        axis = Constant<value_ints = [2]>()
        k = Slice(key, start, end, axis)
    }}"""
    found = read(onnx.parser.parse_model(text))
    assert [(p.part, p.present, p.windowed) for p in found.pairs] == [("key", "k", True), ("value", "value", False)]


def test_a_cache_inside_an_if() -> None:
    branch = "float[b, 2, s, 8] {0}y, float[b, 2, t, 8] {0}k, float[b, 2, t, 8] {0}v"
    first = SPELLED_OUT.replace("key", "a_k").replace("value", "a_v").replace("y =", "a_y =")
    then = first.replace("scores", "a_s").replace("weights", "a_w").replace("turned", "a_t")
    otherwise = "b_k = Identity(new)\n b_v = Identity(new)\n b_y = Identity(q)"
    text = f"""<ir_version: 8, opset_import: ["": 17]> g (bool[1] use_cache_branch, {NEW}, {CACHES})
        => (float[b, 2, s, 8] y, float[b, 2, t, 8] k, float[b, 2, t, 8] v) {{
        y, k, v = If(use_cache_branch)<
            then_branch = t () => ({branch.format("a_")}) {{ {then} }},
            else_branch = e () => ({branch.format("b_")}) {{ {otherwise} }}
        >
    }}"""
    found = read(onnx.parser.parse_model(text))
    assert [(p.part, p.past, p.present, p.axis) for p in found.pairs] == [
        ("key", "past_k", "k", 2),
        ("value", "past_v", "v", 2),
    ]
    assert found.use_cache == "use_cache_branch"
    assert found.problems == ()


def test_a_product_of_one_value_reads_no_cache() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["": 20]>
    g (float[n, k, k] past) => (float[n, k] y) { y = Einsum <equation = "...ii->...i"> (past) }""")
    assert kv_interface(model) is None


def test_keys_of_an_encoder_are_said_to_be_such() -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]> g ({NEW}, {CACHES}, float[b, 2, e, 8] other_k, float[b, 2, e, 8] other_v)
        => (float[b, 2, s, 8] z, float[b, 2, t, 8] key, float[b, 2, t, 8] value) {{
        {SPELLED_OUT}
        turned2 = Transpose<perm = [0, 1, 3, 2]>(other_k)
        scores2 = MatMul(y, turned2)
        weights2 = Softmax(scores2)
        z = MatMul(weights2, other_v)
    }}"""
    found = read(onnx.parser.parse_model(text))
    assert found.encoder_decoder
    assert [(p.past, p.part, p.present) for p in found.cross] == [("other_k", "key", None), ("other_v", "value", None)]
    assert [p.past for p in found.pairs] == ["past_k", "past_v"]


def test_a_present_that_is_missing_is_a_problem() -> None:
    text = f"""<ir_version: 8, opset_import: ["": 17]> g ({NEW}, {CACHES}) => (float[b, 2, s, 8] y, float[b, 2, t, 8] key) {{
        {SPELLED_OUT}
    }}"""
    assert read(onnx.parser.parse_model(text)).problems == (
        "what 'past_v' holds after a step is no output of the graph",
    )


@pytest.mark.export
@pytest.mark.parametrize(
    ("name", "heads", "exporter"),
    [("llama", 2, "torchscript"), ("gpt2", 4, "dynamo"), ("gemma", 2, "torchscript"), ("opt", 4, "dynamo")],
)
def test_transformers(name: str, heads: int, exporter: str) -> None:
    model = load(exported_cached(name, exporter))
    rng = np.random.default_rng(0)
    renamed = {}
    for value in (*model.graph.inputs, *model.graph.outputs):
        renamed[value.name] = f"n{rng.integers(1 << 40)}"
        value.name = renamed[value.name]
    found = kv_interface(model)
    assert found is not None
    positions = renamed.get("position_ids")
    assert roles(found) == (renamed["input_ids"], renamed["attention_mask"], positions, renamed["logits"])
    assert found.positions_from_mask == (name == "opt")
    assert [(p.layer, p.part, p.past, p.present) for p in found.pairs] == [
        (i, part, renamed[f"past_key_values.{i}.{part}"], renamed[f"present.{i}.{part}"])
        for i in range(3)
        for part in ("key", "value")
    ]
    assert {(p.layout, p.heads, p.head_size, p.operator) for p in found.pairs} == {("BHSD", heads, 8, "Concat")}
    assert found.problems == ()
