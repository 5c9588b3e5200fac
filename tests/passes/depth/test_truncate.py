"""truncate: early layers alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tied_models import ALL, DECODERS, assert_same, given, made
from tiny_decoders import decoder
from zeroed import outputs, units_of, zero

import graphopt
from graphopt.errors import UsageError
from graphopt.graph.save import save
from graphopt.passes.depth.truncate import Truncate


@pytest.mark.export
@pytest.mark.parametrize("name", ALL)
def test_later_layers_that_add_nothing_can_go(name: str, tmp_path: Path) -> None:
    model = made(name)
    later = [unit.name for unit in units_of(model).units if unit.stream == 0 and unit.layer > 0]
    layers = len({unit.layer for unit in units_of(model).units if unit.stream == 0})
    whole = model.clone()
    assert not Truncate(layers=layers)(whole).modified
    assert_same(outputs(whole, given(name)), outputs(model, given(name)), 0)
    zero(model, later)
    cut = model.clone()
    assert Truncate(layers=1, norms="keep")(cut).modified
    save(cut, tmp_path / "cut.onnx")
    onnx.checker.check_model(tmp_path / "cut.onnx")
    expected = outputs(model, given(name))
    found = outputs(cut, given(name))
    assert_same(found, {output: expected[output] for output in found})
    if name in DECODERS:
        assert [v.name for v in cut.graph.inputs if v.name and v.name.startswith("past")] == [
            f"past_key_values.0.{part}" for part in ("key", "value")
        ]
        assert list(found) == ["logits", "present.0.key", "present.0.value"]


@pytest.mark.export
def test_an_encoder_gives_the_hidden_state_of_the_early_layer() -> None:
    model = made("bert")
    hidden = next(layer for layer in units_of(model).layers)[-1].norm
    assert hidden is not None
    early = hidden.outputs[0].name
    probe = model.clone()
    probe.graph.outputs.append(next(v for node in probe.graph for v in node.outputs if v.name == early))
    expected = outputs(probe, given("bert"))
    Truncate(layers=1)(model)
    first = next(iter(outputs(model, given("bert")).values()))
    np.testing.assert_allclose(first, expected[early or ""], rtol=1e-6, atol=1e-6)


@pytest.mark.export
def test_a_cut_decoder_generates(tmp_path: Path) -> None:
    model = made("llama")
    Truncate(layers=2)(model)
    save(model, tmp_path / "cut.onnx")
    tokens = graphopt.Generator(tmp_path / "cut.onnx", threads=1).generate([[5, 6, 7]], max_new_tokens=5)
    # The prompt by itself gives the same first token.
    logits = outputs(
        model,
        {
            "input_ids": np.array([[5, 6, 7]]), "attention_mask": np.ones((1, 3), np.int64),
            "position_ids": np.arange(3)[None],
            **{f"past_key_values.{i}.{part}": np.zeros((1, 2, 0, 8), np.float32)
               for i in range(2) for part in ("key", "value")},
        },
    )["logits"]  # fmt: skip
    assert next(iter(tokens))[0] == int(logits[0, -1].argmax())


@pytest.mark.export
def test_the_stream_that_is_cut_can_be_chosen() -> None:
    model = made("whisper")
    found = units_of(model).layers
    sizes = [len([layer for layer in found if layer[0].stream == stream]) for stream in (0, 1)]
    Truncate(layers=1, stream=1)(model)
    after = units_of(model).layers
    lengths = sorted(len([layer for layer in after if layer[0].stream == stream]) for stream in (0, 1))
    assert lengths == sorted((sizes[0], 1))
    with pytest.raises(UsageError, match="stream 5 is none"):
        Truncate(layers=1, stream=5)(model)


@pytest.mark.parametrize(("fraction", "stay"), [(0.5, 2), (0.75, 3), (0.01, 1), (1.0, 4)])
def test_a_fraction_of_the_layers_stays(fraction: float, stay: int) -> None:
    model = ir.from_proto(decoder("attention", layers=4))
    step = Truncate(fraction=fraction)
    step(model)
    assert len(units_of(model).layers) == stay
    assert step.option_values()["layers"] == stay
    # Once more, nothing goes.
    assert not step(model).modified


def test_wrong_options_are_told() -> None:
    for options, message in (
        ({"layers": 0}, "at least one layer"),
        ({"layers": 1, "fraction": 0.5}, "one of them"),
        ({"fraction": 0.0}, "above 0"),
        ({"layers": 1, "norms": "half"}, "norms is one of"),
        ({"layers": 1, "stream": -1}, "stream must not"),
    ):
        with pytest.raises(ValueError, match=message):
            Truncate(**options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="the model has 2"):
        Truncate(layers=3)(ir.from_proto(decoder("attention", layers=2)))
