from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import op_types, parse

import graphopt
from graphopt.graph.edits import nodes
from graphopt.graph.load import load
from graphopt.models.catalogue import fetch
from graphopt.passes.clean.recurrent_outputs import RecurrentOutputs
from graphopt.verification.equivalence import verify

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
END = 9223372036854775807
NUMBERS = (
    f"int64[1] i0 = {{0}}, int64[1] i1 = {{1}}, int64[1] i2 = {{2}}, int64[1] m = {{-1}}, int64[1] e = {{{END}}}, \
int64[2] i01 = {{0, 1}}, int64 n0 = {{0}}, int64 n1 = {{1}}, int64 last = {{-1}}"
)
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def layer(kind: str, direction: str, more: str = "") -> tuple[str, str]:
    """The node, and its weights as graph inputs."""
    count, rows = 2 if direction == "bidirectional" else 1, 2 * GATES[kind]
    activations = ""
    return (
        f'y = {kind} <hidden_size = 2, direction = "{direction}"{activations}> (x, w, r{more})',
        f"float[{count}, {rows}, 3] w, float[{count}, {rows}, 2] r",
    )


def read(body: str, output: str, kind: str = "LSTM", direction: str = "bidirectional", more: str = "") -> list[str]:
    """The operators behind the layer after the pass, which changes no bit."""
    node, weights = layer(kind, direction, more)
    before = parse(f"{HEAD} g (float[5, b, 3] x, {weights}, int32[b] l) => ({output}) <{NUMBERS}> {{ {node} {body} }}")
    after = before.clone()
    RecurrentOutputs()(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert not RecurrentOutputs()(after.clone()).modified
    feeds = {v.name: np.random.default_rng(0).standard_normal([d if isinstance(d, int) else 4 for d in v.shape])
             for v in before.graph.inputs}  # fmt: skip
    feeds = {name: array.astype(np.float32) for name, array in feeds.items()}
    feeds["l"] = np.array([5, 2, 3, 1], np.int32)
    assert verify(before, after, feeds, bitwise=True).ok
    return op_types(after)[1:]


FORWARD = "a = Slice(y, i0, i1, i1) b = Squeeze(a, i1)"
BACKWARD = "c = Slice(y, i1, i2, i1) d = Squeeze(c, i1)"


@pytest.mark.parametrize("kind", sorted(GATES))
@pytest.mark.parametrize(
    ("body", "direction"),
    [
        (f"{FORWARD} f = Slice(b, m, e, i0) z = Squeeze(f, i0)", "bidirectional"),
        (f"{BACKWARD} f = Slice(d, i0, i1, i0) z = Squeeze(f, i0)", "bidirectional"),
        ("a = Gather <axis = 0> (y, last) z = Gather <axis = 0> (a, n0)", "bidirectional"),
        ("a = Gather <axis = 1> (y, n1) z = Gather <axis = 0> (a, n0)", "bidirectional"),
        ("a = Slice(y, m, e, i0) b = Gather <axis = 1> (a, n0) z = Squeeze(b, i0)", "bidirectional"),
        ("a = Squeeze(y, i1) z = Gather <axis = 0> (a, last)", "forward"),
        ("a = Slice(y, i0, i1, i0) z = Squeeze(a, i01)", "reverse"),
    ],
)
def test_the_final_state(kind: str, body: str, direction: str) -> None:
    assert read(body, "float[b, 2] z", kind, direction) == ["Gather"]


@pytest.mark.parametrize(
    ("body", "direction"),
    [
        (f"{FORWARD} f = Slice(b, i0, i1, i0) z = Squeeze(f, i0)", "bidirectional"),  # the first step forward
        (f"{BACKWARD} f = Slice(d, m, e, i0) z = Squeeze(f, i0)", "bidirectional"),  # the last step backward
        ("a = Squeeze(y, i1) z = Gather <axis = 0> (a, n1)", "forward"),
        ("a = Squeeze(y, i1) z = Gather <axis = 0> (a, n1)", "reverse"),
    ],
)
def test_other_steps(body: str, direction: str) -> None:
    assert "Gather" in (found := read(body, "float[b, 2] z", direction=direction)) or "Squeeze" in found
    assert len(found) == body.count("=") - body.count("axis =")


def test_sequences_of_their_own_lengths_end_elsewhere() -> None:
    body = "a = Squeeze(y, i1) z = Gather <axis = 0> (a, last)"
    assert read(body, "float[b, 2] z", direction="forward", more=", , l") == ["Squeeze", "Gather"]


def test_both_directions() -> None:
    ops = read(f"{FORWARD} {BACKWARD} z = Concat <axis = -1> (b, d)", "float[5, b, 4] z")
    assert ops == ["Transpose", "Reshape"]


def test_both_final_states() -> None:
    body = f"""{FORWARD} f = Slice(b, m, e, i0) g = Squeeze(f, i0) {BACKWARD} h = Gather <axis = 0> (d, n0)
        z = Concat <axis = 1> (g, h)"""
    assert read(body, "float[b, 4] z") == ["Transpose", "Reshape"]


@pytest.mark.parametrize("concat", ["z = Concat <axis = 2> (d, b)", "z = Concat <axis = 1> (b, d)",
                                    "z = Concat <axis = 2> (b, b)", "z = Concat <axis = 2> (b, d, b)"])  # fmt: skip
def test_another_order(concat: str) -> None:
    assert read(f"{FORWARD} {BACKWARD} {concat}", "float[i, j, k] z")[-1] == "Concat"


def test_other_readers_keep_what_they_read() -> None:
    body = f"{FORWARD} f = Slice(b, m, e, i0) z = Squeeze(f, i0) q = Neg(b)"
    assert sorted(read(body, "float[b, 2] z, float[5, b, 2] q, float[5, 2, b, 2] y")) == [
        "Gather", "Neg", "Slice", "Squeeze",
    ]  # fmt: skip


@pytest.mark.real
def test_mycroft() -> None:
    recipe = {"passes": ["convert-opset", "fold-constants", "recurrent-outputs"]}
    result = graphopt.optimize(fetch("openwakeword-mycroft"), recipe)
    assert result.report.ok
    left = [n.op_type for n in nodes(result.model)]
    assert (left.count("LSTM"), left.count("Squeeze")) == (2, 0)


@pytest.mark.export
def test_as_torch_writes_it(tmp_path: Path) -> None:
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = torch.nn.LSTM(3, 2, bidirectional=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.rnn(x)[0]

    path = tmp_path / "m.onnx"
    torch.onnx.export(Net().eval(), (torch.randn(5, 2, 3),), str(path), dynamo=False, opset_version=17)
    model = load(path)
    RecurrentOutputs()(model)
    assert verify(path, model, bitwise=True).ok
