from __future__ import annotations

import numpy as np
import pytest
from exactness import op_types, parse

import graphopt
from graphopt.graph.edits import nodes
from graphopt.models.catalogue import fetch
from graphopt.passes.clean.eliminate_dead_code import EliminateDeadCode
from graphopt.passes.clean.omit_zero_states import OmitZeroStates
from graphopt.verification.equivalence import verify

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
LAYER = {"LSTM": (8, "zero, zero"), "GRU": (6, "zero"), "RNN": (2, "zero")}
COMPUTED = """s = Shape(x) n = Slice(s, one, two) sizes = Concat <axis = 0> (n, two)
    flat = {} zero = Unsqueeze(flat, nought)"""
CONSTANTS = "<int64[1] nought = {0}, int64[1] one = {1}, int64[1] two = {2}, float null = {0}, float unit = {1}>"


def model_of(kind: str, zeros: str, extra: str = "") -> str:
    rows, states = LAYER[kind]
    return f"""{HEAD} g (float[t, b, 4] x, float[1, {rows}, 4] w, float[1, {rows}, 2] r) => (float[t, 1, b, 2] y{extra})
        {CONSTANTS} {{ {COMPUTED.format(zeros)} y = {kind} <hidden_size = 2> (x, w, r, , , {states}) }}"""


@pytest.mark.parametrize("kind", sorted(LAYER))
@pytest.mark.parametrize("zeros", ["Expand(null, sizes)", "ConstantOfShape(sizes)"])
def test_computed_zeros(kind: str, zeros: str) -> None:
    before = parse(model_of(kind, zeros))
    after = before.clone()
    OmitZeroStates()(after)
    assert not OmitZeroStates()(after.clone()).modified
    assert verify(before, after, bitwise=True).ok
    EliminateDeadCode()(after)
    assert op_types(after) == [kind]


@pytest.mark.parametrize(
    "zeros", ["Expand(unit, sizes)", "ConstantOfShape <value = float[1] {1}> (sizes)", "RandomNormalLike(n)"]
)
def test_no_zeros(zeros: str) -> None:
    text = model_of("LSTM", zeros)
    if "Random" in zeros:
        text = text.replace(
            "flat = RandomNormalLike(n)", "z = Cast <to = 1> (sizes) z2 = Unsqueeze(z, nought) flat = Neg(z2)"
        )
    before = parse(text)
    assert not OmitZeroStates()(before).modified


def test_one_state_of_two_and_a_constant() -> None:
    before = parse(f"""{HEAD} g (float[t, 1, 4] x, float[1, 8, 4] w, float[1, 8, 2] r, float[1, 1, 2] h)
        => (float[t, 1, 1, 2] y, float[1, 1, 2] last) <float[1, 1, 2] c = {{0, 0}}> {{
        y, u, last = LSTM <hidden_size = 2> (x, w, r, , , h, c) }}""")
    after, rule = before.clone(), OmitZeroStates()
    rule(after)
    assert [s.detail for s in rule.sites] == ["1 initial state of zeros left out"]
    layer = next(iter(after.graph))
    assert [v is not None for v in layer.inputs[5:]] == [True, False] or len(layer.inputs) == 6
    assert verify(before, after, bitwise=True).ok


@pytest.mark.real
def test_mycroft() -> None:
    result = graphopt.optimize(fetch("openwakeword-mycroft"), {"passes": ["omit-zero-states", "eliminate-dead-code"]})
    assert result.report.ok
    assert not {"Expand", "Shape", "Cast"} & {n.op_type for n in nodes(result.model)}
    assert np.isfinite(result.report.run.verdict.margin)
