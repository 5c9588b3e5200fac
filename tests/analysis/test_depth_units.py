"""Depth units: which branches a model can do without."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from tiny_decoders import decoder
from tiny_transformers import exported

from graphopt.analysis.depth_units import DepthUnits, depth_units
from graphopt.analysis.shapes import infer
from graphopt.api import canonical
from graphopt.graph.load import load


def units_of(model: ir.Model) -> DepthUnits:
    return depth_units(model, infer(model, believe_names=True))


@pytest.mark.parametrize("kind", ["group-query", "attention", "concat"])
def test_an_attention_has_its_cache(kind: str) -> None:
    found = units_of(ir.from_proto(decoder(kind)))  # type: ignore[arg-type]
    assert [unit.name for unit in found.units] == ["attention.0", "attention.1"]
    assert [[pair.past for pair in unit.caches] for unit in found.units] == [
        [f"past_key_values.{i}.key", f"past_key_values.{i}.value"] for i in range(2)
    ]
    assert {unit.bytes for unit in found.units if kind == "attention"} <= {4 * 64 * (64 + 32 + 32 + 64)}


@pytest.mark.export
@pytest.mark.parametrize(
    ("name", "kinds", "placements", "layers"),
    [
        ("llama", ["attention", "mlp"] * 3, {"pre"}, 3),
        ("gemma2", ["attention", "mlp"] * 3, {"sandwich"}, 3),
        ("neox", ["attention+mlp"] * 3, {"pre"}, 3),
        ("bert", ["attention", "mlp"] * 3, {"post"}, 3),
        ("vit", ["attention", "mlp"] * 3, {"pre"}, 3),
        ("whisper", ["attention", "mlp"] * 3 + ["attention", "attention", "mlp"] * 2, {"pre"}, 5),
        ("resnet", ["conv"] * 2, {"none"}, 2),
    ],
)
def test_branches_of_every_kind_are_units(name: str, kinds: list[str], placements: set[str], layers: int) -> None:
    model = load(exported(name, "dynamo" if name == "whisper" else "torchscript"))
    canonical(model)
    found = units_of(model)
    assert [unit.kind for unit in found.units] == kinds
    assert {unit.placement for unit in found.units} == placements
    assert len(found.layers) == layers
    assert all((unit.norm is not None) == (unit.placement == "post") for unit in found.units)
    assert all(unit.bytes > 0 for unit in found.units)


@pytest.mark.export
def test_names_choose_branches_and_layers() -> None:
    model = load(exported("whisper"))
    canonical(model)
    found = units_of(model)
    assert [unit.name for unit in found.named(["attention.3.2", "0"])] == [
        "attention.0", "mlp.0", "attention.3.2",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"no branch 'mlp\.9'"):
        found.named(["mlp.9"])


@pytest.mark.export
def test_a_shortcut_that_changes_the_shape_is_no_unit() -> None:
    model = load(exported("resnet", "torchscript"))
    canonical(model)
    assert {reason for _, reason in units_of(model).left} == {"the skip changes the shape of what it passes"}
