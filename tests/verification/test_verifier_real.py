"""Every real ONNX model of the catalogue: probes on which it runs, equal to itself, unequal to one with a wrong weight."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.graph.load import load
from graphopt.models import catalogue
from graphopt.verification.structure import check_structure
from graphopt.verification.verifier import Verifier

KEYS = [key for key, model in catalogue.MODELS.items() if model.kind == "onnx"]


@pytest.mark.real
@pytest.mark.parametrize("key", KEYS)
def test_real_model(key: str) -> None:
    pytest.importorskip("onnxruntime")
    model = load(catalogue.fetch(key))
    assert check_structure(model) == []
    verifier = Verifier(model)
    assert not verifier.unusable
    assert len(verifier.probes) >= 2
    same = verifier.check(model, bitwise=True)
    assert same.ok, same.summary
    assert same.margin == 0

    wrong = model.clone()
    assert _damage_a_weight(wrong)
    verdict = verifier.check(wrong)
    assert not verdict.ok
    assert verdict.margin > 1
    verifier.close()


def _damage_a_weight(model: ir.Model) -> bool:
    """Halve every third number of the largest float weight."""
    weights: list[tuple[int, ir.Value | ir.Node]] = [
        (v.const_value.size, v) for v in model.graph.initializers.values() if v.dtype == ir.DataType.FLOAT
    ]
    weights += [
        (node.attributes["value"].as_tensor().size, node)
        for node in model.graph.all_nodes()
        if node.op_type == "Constant"
        and "value" in node.attributes
        and node.attributes["value"].as_tensor().dtype == ir.DataType.FLOAT
    ]
    if not weights:
        return False
    _, place = max(weights, key=lambda w: w[0])
    old = place.const_value if isinstance(place, ir.Value) else place.attributes["value"].as_tensor()
    array = old.numpy().copy()
    array.reshape(-1)[::3] *= np.float32(0.5)
    tensor = ir.tensor(array, name=old.name)
    if isinstance(place, ir.Value):
        place.const_value = tensor
    else:
        place.attributes["value"] = ir.AttrTensor("value", tensor)
    return True
