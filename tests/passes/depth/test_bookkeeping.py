"""A branch that adds nothing can go: equal outputs, its cache gone, the others numbered without the gap."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tied_models import ALL, DECODERS, given, made
from tiny_decoders import decoder
from zeroed import outputs, units_of, zero

import graphopt
from graphopt.api import canonical
from graphopt.errors import UsageError
from graphopt.graph.assumptions import Reliance, note, read
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.passes.depth.drop_layers import DropLayers


@pytest.mark.export
@pytest.mark.parametrize("name", [*ALL, "resnet"])
def test_a_branch_that_adds_nothing_can_go(name: str, tmp_path: Path) -> None:
    model = made(name)
    fed = given(name)
    units = units_of(model).units
    for unit in dict.fromkeys((units[0], units[len(units) // 2], units[-1])):
        zeroed = model.clone()
        zero(zeroed, [unit.name])
        expected = outputs(zeroed, fed)
        dropped = zeroed.clone()
        step = DropLayers(branches=[unit.name], norms="keep")
        assert step(dropped).modified
        save(dropped, tmp_path / "dropped.onnx")
        onnx.checker.check_model(tmp_path / "dropped.onnx")
        before = [v.name for v in zeroed.graph.inputs]
        caches = [name for name in before if name and name.startswith("past")]
        gone = [pair.past for pair in unit.caches]
        assert len(gone) == (2 if name in DECODERS and "attention" in unit.kind else 0)
        stay = [name for name in caches if name not in gone]
        # The old cache under its new name, in the old order.
        assert [v.name for v in dropped.graph.inputs] == before[: len(before) - len(gone)]
        numbered = dict(zip(caches, stay, strict=False))
        found = outputs(dropped, {**fed, **{new: fed[old] for new, old in numbered.items()}})
        old = {new.replace("past_key_values", "present"): of.replace("past_key_values", "present")
               for new, of in numbered.items()}  # fmt: skip
        assert len(found) == len(expected) - len(gone)
        for output, array in found.items():
            np.testing.assert_allclose(array, expected[old.get(output, output)], rtol=1e-5, atol=1e-5)
        assert sum(len(v.uses()) == 0 for v in dropped.graph.initializers.values()) == 0
        assert len(dropped.graph) < len(model.graph)


def unet(exporter: str, path: Path) -> ir.Model:
    """Residual blocks at two resolutions, and a long skip from before the lower one to behind it."""
    import torch
    from torch import nn

    class Block(nn.Module):  # type: ignore[misc]
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm, self.first = nn.GroupNorm(4, width), nn.Conv2d(width, width, 3, padding=1)
            self.second = nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.second(nn.functional.silu(self.first(self.norm(x))))

    class UNet(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
            self.high, self.low, self.last = Block(8), nn.Sequential(Block(16), Block(16)), Block(8)
            self.up, self.join = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Conv2d(16, 8, 1)
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            skip = self.high(self.stem(image))
            low = self.up(self.low(self.down(skip)))
            return self.head(self.last(self.join(torch.cat([low, skip], dim=1))))

    torch.manual_seed(0)
    sample = torch.zeros(2, 3, 16, 16)
    names = {"input_names": ["image"], "output_names": ["out"]}
    if exporter == "dynamo":
        torch.onnx.export(UNet().eval(), (sample,), path, dynamo=True, verbose=False, **names)
    else:
        torch.onnx.export(UNet().eval(), (sample,), path, dynamo=False, opset_version=17, **names)
    model = load(path)
    canonical(model)
    return model


@pytest.mark.export
@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_residual_blocks_of_a_u_net_can_go(exporter: str, tmp_path: Path) -> None:
    """At either resolution, before and behind the long skip; what changes the shape isn't one of them."""
    model = unet(exporter, tmp_path / "model.onnx")
    fed = {"image": np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)}
    units = units_of(model).units
    assert len(units) == 4
    for unit in units:
        zeroed = model.clone()
        zero(zeroed, [unit.name])
        expected = outputs(zeroed, fed)
        dropped = zeroed.clone()
        assert DropLayers(branches=[unit.name])(dropped).modified
        assert (
            sum(node.op_type == "Conv" for node in dropped.graph) == sum(n.op_type == "Conv" for n in model.graph) - 2
        )
        np.testing.assert_allclose(outputs(dropped, fed)["out"], expected["out"], rtol=1e-5, atol=1e-5)


@pytest.mark.export
@pytest.mark.parametrize("name", ["llama", "neox"])
def test_a_decoder_of_uneven_layers_generates(name: str, tmp_path: Path) -> None:
    model = made(name)
    drop = ["attention.0", "mlp.1"] if name == "llama" else ["attention+mlp.1"]
    zero(model, drop)
    save(model, tmp_path / "whole.onnx")
    assert DropLayers(branches=drop)(model).modified
    interface = kv_interface(model)
    assert interface is not None
    assert [pair.past for pair in interface.pairs] == [
        f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")
    ]
    save(model, tmp_path / "dropped.onnx")
    texts = [
        graphopt.Generator(tmp_path / f"{file}.onnx", threads=1).generate([[5, 6, 7]], max_new_tokens=6)
        for file in ("whole", "dropped")
    ]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("kind", ["group-query", "attention", "concat"])
@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("past_key_values.{}.{} present.{}.{}", ["past_key_values.0.key", "past_key_values.1.key"]),
        ("cache_{0:02d}_of_12_{1} new_{0:02d}_of_12_{1}", ["cache_00_of_12_key", "cache_01_of_12_key"]),
    ],
)
def test_names_keep_their_pattern(kind: str, names: str, expected: list[str]) -> None:
    forms = names.split()
    model = ir.from_proto(decoder(kind, layers=3, names=" ".join(forms)))  # type: ignore[arg-type]
    note(model, Reliance("no-batched-chunks", {"ids": "input_ids", "past": forms[0].format(0, "key")}, "why", "test"))
    DropLayers(branches=["attention.0"])(model)
    pasts = [v.name for v in model.graph.inputs if v.name not in ("input_ids", "attention_mask")]
    assert pasts[::2] == expected
    assert len(model.graph.outputs) == 5
    assert {value for one in read(model) for value in one.inputs.values()} <= {v.name for v in model.graph.inputs}


def test_sizes_are_read_of_a_cache_that_stays() -> None:
    proto = decoder("attention", layers=3)
    # The mask's width comes from the first cache in place of the mask's own shape.
    length = onnx.helper.make_node("Shape", ["past_key_values.0.key"], ["old"], start=2, end=3)
    new = onnx.helper.make_node("Shape", ["input_ids"], ["fresh"], start=1, end=2)
    total = onnx.helper.make_node("Add", ["old", "fresh"], ["whole"])
    scalar = onnx.helper.make_node("Squeeze", ["whole"], ["wide"])
    nodes = [n for n in proto.graph.node if "wide" not in n.output]
    del proto.graph.node[:]
    proto.graph.node.extend([length, new, total, scalar, *nodes])
    model = ir.from_proto(proto)
    DropLayers(branches=["attention.0"])(model)
    assert [v.name for v in model.graph.inputs][2:] == [
        f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")
    ]
    shapes = [n.inputs[0] for n in model.graph if n.op_type == "Shape" and "start" in n.attributes]
    assert model.graph.inputs[2] in shapes
    rng = np.random.default_rng(0)
    given = {
        "input_ids": np.array([[1, 2]]), "attention_mask": np.ones((1, 5), np.int64),
        **{v.name or "": rng.normal(size=(1, 2, 3, 16)).astype(np.float32) for v in model.graph.inputs[2:]},
    }  # fmt: skip
    assert outputs(model, given)["present.1.key"].shape == (1, 2, 5, 16)


def test_a_cache_that_others_read_stays_with_its_attention() -> None:
    proto = decoder("attention", layers=3)
    node = next(n for n in proto.graph.node if n.op_type == "Attention" and n.output[1] == "present.2.key")
    # The last layer reads the keys and values of the second.
    moved = ["q2", "k1", "v1", "bias", "past_key_values.1.key", "past_key_values.1.value"]
    del node.input[:]
    node.input.extend(moved)
    del node.output[1:]
    for values, prefix in ((proto.graph.input, "past_key_values.2"), (proto.graph.output, "present.2")):
        kept = [v for v in values if not v.name.startswith(prefix)]
        del values[:]
        values.extend(kept)
    model = ir.from_proto(proto)
    with pytest.raises(UsageError, match="read by"):
        DropLayers(branches=["attention.1"])(model)
    step = DropLayers(count=1, score="last")
    assert step(model).modified
    assert step.branches == ["attention.2"]


def test_the_last_cache_stays() -> None:
    model = ir.from_proto(decoder("attention", layers=2))
    with pytest.raises(UsageError, match="no cache would be left"):
        DropLayers(branches=["0", "1"])(model)
