"""Which layers are left, and the configuration that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from tiny_decoders import decoder

from graphopt.export.packaging import carry
from graphopt.graph.kept_layers import KEPT_KEY, KeptLayers, kept_layers, note_kept, shortened
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.passes.depth.drop_layers import DropLayers


def test_layers_are_counted_as_the_original_did() -> None:
    model = ir.from_proto(decoder(layers=2))
    assert kept_layers(model) is None
    note_kept(model, range(6), [0, 2, 3, 5])
    assert kept_layers(model) == KeptLayers(6, (0, 2, 3, 5))
    since = model.clone()
    note_kept(model, range(4), [0, 1, 3])
    assert kept_layers(model) == KeptLayers(6, (0, 2, 5))
    assert kept_layers(model, since=since) == KeptLayers(4, (0, 1, 3))
    assert kept_layers(since, since=since) is None


@pytest.mark.parametrize("text", ["no JSON", "[]", '{"of": 2}', '{"of": 2, "kept": [5]}', '{"of": 2, "kept": ["x"]}'])
def test_other_metadata_is_none(text: str) -> None:
    model = ir.from_proto(decoder())
    model.metadata_props[KEPT_KEY] = text
    assert kept_layers(model) is None


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"num_hidden_layers": 4, "num_attention_heads": 4}, {"num_hidden_layers": 3, "num_attention_heads": 4}),
        ({"num_hidden_layers": 8}, {"num_hidden_layers": 8}),
        ({"layer_types": ["a", "b", "c", "d"]}, {"layer_types": ["a", "c", "d"]}),
        ({"vision_config": {"n_layer": 4}, "n_layer": 4}, {"vision_config": {"n_layer": 4}, "n_layer": 3}),
        ({"num_hidden_layers": 4, "decoder_layers": 4}, {"num_hidden_layers": 4, "decoder_layers": 3}),
        ({"num_layers": 4, "num_decoder_layers": 4}, {"num_layers": 4, "num_decoder_layers": 3}),
        (
            {"attention_types": [[["global", "local"], 2]]},
            {"attention_types": [[["global"], 1], [["global"], 1], [["local"], 1]]},
        ),
        ({"text_config": {"n_layer": 4}, "eos": [1, 2, 3, 4]}, {"text_config": {"n_layer": 3}, "eos": [1, 2, 3, 4]}),
    ],
)
def test_a_configuration_for_fewer_layers(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert shortened(before, KeptLayers(4, (0, 2, 3))) == after


def test_the_configuration_beside_the_model_counts_what_is_left(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("whole", "shorter", "shortest")]
    for folder in folders:
        folder.mkdir()
    onnx.save(decoder("attention", layers=4), folders[0] / "model.onnx")
    (folders[0] / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "hidden_size": 64}))
    for old, new, names in zip(folders, folders[1:], (["attention.1"], ["attention.0", "attention.2"]), strict=False):
        model = load(old / "model.onnx")
        DropLayers(branches=names)(model)
        save(model, new / "model.onnx")
        carry(old / "model.onnx", new / "model.onnx")
    counts = [json.loads((folder / "config.json").read_text())["num_hidden_layers"] for folder in folders]
    assert counts == [4, 3, 1]
    assert kept_layers(load(folders[2] / "model.onnx")) == KeptLayers(4, (2,))
