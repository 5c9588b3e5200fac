"""What is noted of caches that are equal, and kept once."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.graph.equal_caches import EQUAL_KEY, equal_caches, rename_equal


def noted(text: str) -> ir.Model:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 20]> g (float[n] x) => (float[n] y) { y = Neg(x) }')
    model.metadata_props[EQUAL_KEY] = text
    return model


def test_a_renaming_reaches_what_is_gone_too() -> None:
    model = noted('{"past.1.value": "past.0.value", "past.2.value": "past.0.value"}')
    rename_equal(model, {"past.0.value": "v0", "past.1.value": "v1"})
    assert equal_caches(model) == {"v1": "v0", "past.2.value": "v0"}


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}'])
def test_what_is_no_note(text: str) -> None:
    with pytest.raises(ModelError, match="isn't an object of names"):
        equal_caches(noted(text))
