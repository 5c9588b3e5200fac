"""The model of a folder, and the tokens that end a text."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from tiny_decoders import decoder

from graphopt import Generator
from graphopt.errors import ModelError
from graphopt.runtime_ops.folder import model_file, stop_tokens


def test_the_model_of_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no .onnx file and no model.onnx; give the file\.$"):
        model_file(tmp_path)
    (tmp_path / "a.onnx").touch()
    assert model_file(tmp_path) == tmp_path / "a.onnx"
    assert model_file(tmp_path / "b.onnx") == tmp_path / "b.onnx"
    (tmp_path / "b.onnx").touch()
    with pytest.raises(ModelError, match=r"holds a.onnx, b.onnx, ... and no model.onnx"):
        model_file(tmp_path)
    (tmp_path / "model.onnx").touch()
    assert model_file(tmp_path) == tmp_path / "model.onnx"


def test_where_a_text_ends(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    assert stop_tokens(model) == ()
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert stop_tokens(model) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert stop_tokens(model) == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 2]}')
    assert stop_tokens(model) == (7, 2)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config.json, which says where a text ends, can't be read"):
        stop_tokens(model)


def test_a_generator_stops_where_the_folder_says(tmp_path: Path) -> None:
    onnx.save(decoder("concat"), tmp_path / "model.onnx")
    [whole] = Generator(tmp_path).generate([[1, 2, 3]], max_new_tokens=12)
    assert len(whole) == 12
    last = whole[5]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [last]}))
    generator = Generator(str(tmp_path))
    assert generator.stop == (last,)
    end = whole.index(last) + 1
    assert generator.generate([[1, 2, 3]], max_new_tokens=12) == [whole[:end]]
    assert generator.generate([[1, 2, 3]], max_new_tokens=12, stop=[]) == [whole]
