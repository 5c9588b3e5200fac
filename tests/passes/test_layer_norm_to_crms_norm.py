"""layer-norm-to-crms-norm: one feature fewer, the same outputs."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse_weighted, to_float64

from graphopt.graph import computed
from graphopt.passes.fold.layer_norm_to_crms_norm import LayerNormToCrmsNorm

HEAD = '<ir_version: 10, opset_import: ["": 23]>'
WEIGHTS = """<float[9, 4] table, float[5, 4] positions, float[4, 6] w, float[4, 6] u, float[6, 4] v, float[4] b,
    float[4] g = {1, 1, 1, 1}, float[4] odd = {1, 2, 1, 1}, float[3, 4] head, float half = {0.5}>"""
BODY = """
    e = Gather(table, ids)
    s0 = Add(e, positions)
    n = LayerNormalization <axis = -1, epsilon = 0.1> (s0, g)
    m = MatMul(n, w)
    a = Relu(m)
    d = MatMul(a, v)
    db = Add(d, b)
    s1 = Add(s0, db)
    s2 = Mul(s1, half)
    s3 = Add(s2, half)
    f = LayerNormalization <axis = -1> (s3, g)
    q = MatMul(f, u)
    y = Relu(q)
"""


def block(body: str = BODY, outputs: str = "float[2, 5, 6] y") -> ir.Model:
    return to_float64(parse_weighted(f"{HEAD} g (int64[2, 5] ids) => ({outputs}) {WEIGHTS} {{ {body} }}"))


def test_exact_and_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    for lazy in (1 << 20, 0):
        monkeypatch.setattr(computed, "LAZY_BYTES", lazy)
        after = assert_exact(block(), LayerNormToCrmsNorm())
        assert "LayerNormalization" not in op_types(after)
        shapes = {name: tuple(v.const_value.shape.numpy()) for name, v in after.graph.initializers.items()}
        assert (shapes["table"], shapes["w"], shapes["v"], shapes["b"]) == ((9, 3), (3, 6), (6, 3), (3,))


def test_gemm_reads_and_writes() -> None:
    text = f"""{HEAD} g (int64[5] ids) => (float[5, 3] y) {WEIGHTS} {{
        e = Gather(table, ids)
        n = LayerNormalization <axis = -1, epsilon = 0.1> (e, g)
        m = Gemm <transB = 1> (n, head)
        d = Gemm(m, up, b)
        s = Add(e, d)
        f = LayerNormalization <axis = -1> (s, g)
        y = Gemm <transB = 1> (f, last)
    }}""".replace("float[3, 4] head", "float[3, 4] head, float[3, 4] up, float[3, 4] last")
    after = assert_exact(to_float64(parse_weighted(text)), LayerNormToCrmsNorm())
    assert op_types(after).count("Sqrt") == 2


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("f = LayerNormalization <axis = -1> (s3, g)", "f = LayerNormalization <axis = -1> (s3, odd)", "gain or bias"),
        ("q = MatMul(f, u)", "q = MatMul(f, w)", "shared"),
        ("y = Relu(q)", "y = Add(q, z) z = MatMul(p, u) p = Relu(f)", "no linear layer"),
        ("s1 = Add(s0, db)", "t = Unsqueeze(db, k) t2 = Squeeze(t, k) s1 = Add(s0, t2)", "number of features"),
    ],
)
def test_left(old: str, new: str, reason: str) -> None:
    lines = [line.strip() for line in BODY.strip().splitlines()]
    index = lines.index(old)
    parts = new.split("  ") if "  " in new else [new]
    if "z = MatMul" in new:
        parts = ["p = Relu(f)", "z = MatMul(p, u2)", "y = Add(q, z)"]
    lines[index : index + 1] = parts
    weights = WEIGHTS.replace("float[6, 4] v", "float[6, 4] v, float[4, 6] u2, int64[1] k = {0}")
    text = f"{HEAD} g (int64[2, 5] ids) => (float[2, 5, 6] y) {weights} {{ {' '.join(lines)} }}"
    rule = LayerNormToCrmsNorm()
    assert not rule(to_float64(parse_weighted(text))).modified
    assert all(reason in site.detail for site in rule.sites), rule.sites
