"""skip-rms-norm: exact by the operator's definition, at every site with `always`, by the profile without."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from contrib_reference import contrib_outputs
from exactness import op_types, parse_weighted, random_feeds, to_float64
from fake_profiles import fake

from graphopt.passes.lower.skip_rms_norm import SkipRmsNorm

TEXT = """<ir_version: 10, opset_import: ["": 23]>
g (float[b, s, 8] x, float[b, 1, 8] narrow) => (float[b, s, 8] y%s)
<float[8] w, float[8] c> {
  r = Tanh(x)
  %s
}"""
CHAIN = "a = Add(x, r)\n  n = RMSNormalization<axis = -1, epsilon = 0.001>(a, w)\n  m = Relu(n)\n  y = Add(m, a)"


def merged(text: str, always: bool = True) -> tuple[ir.Model, SkipRmsNorm]:
    """The result on a copy, equal in float64 and in ONNX Runtime; a second run changes nothing."""
    before = parse_weighted(text)
    after, rule = before.clone(), SkipRmsNorm(always=always)
    rule(after)
    assert not SkipRmsNorm(always=always)(after).modified
    feeds = random_feeds(before)
    double = {name: array.astype(np.float64) for name, array in feeds.items()}
    pairs = [(contrib_outputs(to_float64(before), double), contrib_outputs(to_float64(after), double), 1e-12)]
    sessions = [
        ort.InferenceSession(ir.to_proto(m).SerializeToString(), providers=["CPUExecutionProvider"])
        for m in (before, after)
    ]
    names = [output.name for output in sessions[0].get_outputs()]
    assert names == [output.name for output in sessions[1].get_outputs()]
    first, second = (dict(zip(names, session.run(None, feeds), strict=True)) for session in sessions)
    pairs.append((first, second, 1e-6))
    for expected, got, tolerance in pairs:
        for name in names:
            np.testing.assert_allclose(got[name], expected[name], atol=tolerance * np.abs(expected[name]).max())
    return after, rule


def test_the_sum_that_is_read_again_is_the_fourth_output() -> None:
    after, rule = merged(TEXT % ("", CHAIN))
    assert op_types(after) == ["Tanh", "SkipSimplifiedLayerNormalization", "Relu", "Add"]
    assert [len(n.outputs) for n in after.graph if n.op_type.startswith("Skip")] == [4]
    assert [site.outcome for site in rule.sites] == ["applied"]


def test_a_sum_that_nothing_else_reads() -> None:
    after, _ = merged(TEXT % ("", "a = Add(x, r)\n  y = RMSNormalization<axis = 2>(a, w)"))
    assert op_types(after) == ["Tanh", "SkipSimplifiedLayerNormalization"]


def test_a_sum_that_is_an_output_keeps_its_name() -> None:
    after, _ = merged(TEXT % (", float[b, s, 8] a", CHAIN))
    assert [v.name for v in after.graph.outputs] == ["y", "a"]
    assert op_types(after)[1] == "SkipSimplifiedLayerNormalization"


def test_a_reader_between_the_sum_and_the_norm() -> None:
    body = "a = Add(x, r)\n  e = Exp(a)\n  n = RMSNormalization<axis = -1>(a, w)\n  y = Add(n, e)"
    after, _ = merged(TEXT % ("", body))
    assert sorted(op_types(after)) == ["Add", "Exp", "SkipSimplifiedLayerNormalization", "Tanh"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("a = Add(x, narrow)\n  y = RMSNormalization<axis = -1>(a, w)", ["the shapes of its operands"]),
        ("a = Add(x, r)\n  y = RMSNormalization<axis = 1>(a, w)", ["isn't over the last axis"]),
        ("a = Add(x, c)\n  y = RMSNormalization<axis = -1>(a, w)", []),
        ("a = Mul(x, r)\n  y = RMSNormalization<axis = -1>(a, w)", []),
    ],
)
def test_left(body: str, told: list[str]) -> None:
    model = parse_weighted(TEXT % ("", body))
    rule = SkipRmsNorm(always=True)
    assert not rule(model).modified
    assert [word in site.detail for word, site in zip(told, rule.sites, strict=True)] == [True] * len(told)


def test_double_is_left_and_half_is_taken() -> None:
    for dtype, changed in (("double", False), ("float16", True)):
        model = parse_weighted((TEXT % ("", CHAIN)).replace("float[", f"{dtype}["))
        assert SkipRmsNorm(always=True)(model).modified == changed


def test_by_default_the_profile_decides() -> None:
    model = parse_weighted(TEXT % ("", CHAIN))
    rule = SkipRmsNorm()
    assert not rule(model).modified
    assert rule.sites == []
    rule.profile = fake("residual-rms-norm", 0.5, alternative="skip")
    assert rule(model).modified
    slower = SkipRmsNorm()
    slower.profile = fake("residual-rms-norm", 1.5, alternative="skip")
    assert not slower(parse_weighted(TEXT % ("", CHAIN))).modified
