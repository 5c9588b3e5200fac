"""Names by convention for a decoder's inputs and outputs."""

from __future__ import annotations

import json

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from tiny_decoders import decoder

import graphopt
from graphopt.errors import ModelError, UsageError
from graphopt.graph.kv_names import RENAMED_KEY, original_names, rename_kv_cache, restore_names
from graphopt.graph.load import load
from graphopt.verification.equivalence import verify

ENDS = ["input_ids", "attention_mask", "position_ids"]
CACHES = [f"{i}.{part}" for i in range(2) for part in ("key", "value")]


def ends(model: ir.Model) -> tuple[list[str | None], list[str | None]]:
    return [v.name for v in model.graph.inputs], [v.name for v in model.graph.outputs]


EXPECTED = (
    [*ENDS, *(f"past_key_values.{c}" for c in CACHES)],
    ["logits", *(f"present.{c}" for c in CACHES)],
)


def test_names_and_order_follow_the_convention() -> None:
    proto = decoder("concat", positions=True, names="in{}{} out{}{}")
    for values in (proto.graph.input, proto.graph.output):
        turned = list(values)[::-1]
        del values[:]
        values.extend(turned)
    model = ir.from_proto(proto)
    assert rename_kv_cache(model)["in0key"] == "past_key_values.0.key"
    assert ends(model) == EXPECTED
    assert rename_kv_cache(model) == {}
    onnx.checker.check_model(ir.to_proto(model))


def test_names_that_are_taken_inside_give_way() -> None:
    proto = decoder("concat", names="in{}{} out{}{}")
    inner = {"q0": "present.0.key", "wq1": "past_key_values.1.value"}
    for node in proto.graph.node:
        node.input[:] = [inner.get(n, n) for n in node.input]
        node.output[:] = [inner.get(n, n) for n in node.output]
    for tensor in proto.graph.initializer:
        tensor.name = inner.get(tensor.name, tensor.name)
    model = ir.from_proto(proto)
    feeds = {
        "input_ids": np.array([[1, 2]]),
        "attention_mask": np.ones((1, 2), np.int64),
        **{f"in{i}{part}": np.zeros((1, 2, 0, 16), np.float32) for i in range(2) for part in ("key", "value")},
    }
    before = onnxruntime.InferenceSession(proto.SerializeToString()).run(["logits"], feeds)[0]
    names = rename_kv_cache(model)
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    after = session.run(["logits"], {names.get(name, name): array for name, array in feeds.items()})[0]
    assert np.array_equal(before, after)


def test_names_that_swap_places() -> None:
    model = ir.from_proto(decoder("concat"))
    first, second = (next(v for v in model.graph.outputs if v.name == f"present.{i}.key") for i in range(2))
    first.name, second.name = "present.1.key", "present.0.key"
    assert rename_kv_cache(model) == {"present.1.key": "present.0.key", "present.0.key": "present.1.key"}
    assert (first.name, second.name) == ("present.0.key", "present.1.key")


def test_the_names_of_before_are_kept_and_come_back() -> None:
    model = ir.from_proto(decoder("concat", names="in{}{} out{}{}"))
    before = {frozenset(names) for names in ends(model)}
    rename_kv_cache(model)
    assert original_names(model)["present.1.key"] == "out1key"
    restore_names(model)
    assert {frozenset(names) for names in ends(model)} == before
    assert RENAMED_KEY not in model.metadata_props


def test_what_is_taken_for_granted_names_the_inputs_as_they_are_called() -> None:
    model = ir.from_proto(decoder("concat", names="in{}{} out{}{}"))
    key = "graphopt.assumptions"
    entry = {"assumption": "batch=1", "inputs": {"ids": "input_ids", "past": "in0key"}}
    model.metadata_props[key] = json.dumps([entry])
    rename_kv_cache(model)
    assert json.loads(model.metadata_props[key])[0]["inputs"] == {"ids": "input_ids", "past": "past_key_values.0.key"}
    restore_names(model)
    assert json.loads(model.metadata_props[key]) == [entry]


def test_models_that_have_nothing_to_rename() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[b, 4] x) => (float[b, 4] y) { y = Relu(x) }'
    with pytest.raises(UsageError, match="no KV cache"):
        rename_kv_cache(ir.from_proto(onnx.parser.parse_model(text)))
    broken = decoder("concat")
    broken.graph.output.pop()
    with pytest.raises(UsageError, match=r"can't be renamed: what 'past_key_values.1.value'"):
        rename_kv_cache(ir.from_proto(broken))
    model = ir.from_proto(decoder("concat"))
    model.metadata_props[RENAMED_KEY] = "[1]"
    with pytest.raises(ModelError, match="isn't an object of names"):
        original_names(model)


def test_optimize_renames_at_the_end_and_verify_still_compares(tmp_path) -> None:
    path = tmp_path / "decoder.onnx"
    onnx.save(decoder("concat", positions=True, names="in{}{} out{}{}"), path)
    result = graphopt.optimize(path, rename_kv=True)
    assert ends(result.model) == EXPECTED
    assert result.report.ok
    data = json.loads(json.dumps(result.report.to_dict()))
    assert data["renamed"]["out0key"] == "present.0.key"
    result.save(tmp_path / "renamed.onnx")
    assert verify(path, tmp_path / "renamed.onnx").ok
    assert verify(tmp_path / "renamed.onnx", path).ok
    assert verify(load(path), result.model).ok
    assert ends(result.model) == EXPECTED  # untouched by the comparison
    texts = [graphopt.Generator(p).generate([[1, 2, 3]], max_new_tokens=5) for p in (path, tmp_path / "renamed.onnx")]
    assert texts[0] == texts[1]
