"""remove_pairs: which names are left, who answers for the shape of a removed cache, and what the metadata says then."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest
import tiny_decoders

from graphopt.graph.assumptions import ASSUMPTIONS_KEY
from graphopt.graph.edits import Editor
from graphopt.graph.kv_edits import remove_pairs
from graphopt.graph.kv_interface import KVInterface, kv_interface
from graphopt.graph.kv_names import RENAMED_KEY, original_names


def decoder(names: str = "past_key_values.{}.{} present.{}.{}") -> tuple[ir.Model, KVInterface]:
    model = ir.from_proto(tiny_decoders.decoder("attention", layers=3, names=names))
    interface = kv_interface(model)
    assert interface is not None
    return model, interface


def detached(model: ir.Model, layer: int) -> None:
    """Take the attention of a layer out: its result is its queries."""
    node = [node for node in model.graph if node.op_type == "Attention"][layer]
    for present in node.outputs[1:3]:
        model.graph.outputs.remove(present)
    edit = Editor(model)
    query = node.inputs[0]
    assert query is not None
    node.outputs[0].replace_all_uses_with(query)
    edit.remove_dead(node)


@pytest.mark.parametrize("names", ["past_key_values.{}.{} present.{}.{}", "past_{}_{} out/{}/{}"])
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_first_names_go_to_those_that_are_left(layer: int, names: str) -> None:
    model, interface = decoder(names)
    keys = [pair.past for pair in interface.pairs if pair.part == "key"]
    detached(model, layer)
    renamed = remove_pairs(model, interface, [pair for pair in interface.pairs if pair.layer == layer])
    now = kv_interface(model)
    assert now is not None
    assert now.problems == ()
    assert [pair.past for pair in now.pairs] == [pair.past for pair in interface.pairs][:4]
    assert [pair.present for pair in now.pairs] == [pair.present for pair in interface.pairs][:4]
    assert {old: new for old, new in renamed.items() if old in keys} == dict(
        zip(keys[layer + 1 :], keys[layer:], strict=False)
    )
    assert len({value.name for value in model.graph.inputs}) == len(model.graph.inputs)


def test_another_cache_tells_the_length() -> None:
    model, interface = decoder()
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    asked = ir.node("Shape", [past], name="asked")
    model.graph.append(asked)
    detached(model, 0)
    remove_pairs(model, interface, interface.pairs[:2])
    told = asked.inputs[0]
    assert told is not None
    assert told in model.graph.inputs
    assert told.name == "past_key_values.0.key"


def test_a_cache_that_is_read_isnt_removed() -> None:
    model, interface = decoder()
    with pytest.raises(ValueError, match="still read"):
        remove_pairs(model, interface, interface.pairs[:2])


def test_metadata_names_what_is_there() -> None:
    model, interface = decoder()
    entry = {"assumption": "batch=1", "inputs": {"past": "past_key_values.2.key"}, "reason": "", "pass": "x"}
    model.metadata_props[ASSUMPTIONS_KEY] = json.dumps([entry])
    model.metadata_props[RENAMED_KEY] = json.dumps({"past_key_values.0.key": "a", "past_key_values.2.key": "c"})
    detached(model, 1)
    remove_pairs(model, interface, [pair for pair in interface.pairs if pair.layer == 1])
    assert json.loads(model.metadata_props[ASSUMPTIONS_KEY])[0]["inputs"] == {"past": "past_key_values.1.key"}
    names = original_names(model)
    assert (names["past_key_values.0.key"], names["past_key_values.1.key"]) == ("a", "c")
