"""What the recogniser of convolutional structures finds, in small graphs and in real models."""

from __future__ import annotations

import collections

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.analysis.conv_structures import conv_structures
from graphopt.models import catalogue


def model(body: str, channels: int = 8, **weights: tuple[int, ...]) -> ir.Model:
    """Lines of `name = Op(...)` on x; each node is called as its output."""
    text = f'<ir_version: 10, opset_import: ["": 20]> g (float[1,{channels},9,9] x) => (float[a,b,c,d] y) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    for name, shape in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros(shape, np.float32), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return ir.from_proto(proto)


def found(m: ir.Model) -> list[tuple[str, str, str]]:
    return [(s.kind, " ".join(s.nodes), s.detail) for s in conv_structures(m)]


PAD = "<pads=[1,1,1,1]>"
DEPTHWISE = "<pads=[1,1,1,1], group=8>"
NORM = "BatchNormalization({0}, n, n, n, n)"


def test_separable() -> None:
    m = model(
        f"p = Conv{DEPTHWISE}(x, a)  q = {NORM.format('p')}  r = Relu(q)  s = Conv(r, b)  y = Relu(s)",
        a=(8, 1, 3, 3), b=(12, 8, 1, 1), n=(8,),
    )  # fmt: skip
    assert found(m) == [("separable", "p s", "3×3 depthwise, 8 → 12 channels")]
    assert conv_structures(m)[0].to_dict() == {
        "kind": "separable", "nodes": ["p", "s"], "detail": "3×3 depthwise, 8 → 12 channels",
    }  # fmt: skip


ACTIVATIONS = {
    "SiLU": "g = Sigmoid(p)  r = Mul(p, g)",
    "SiLU, commuted": "g = Sigmoid(p)  r = Mul(g, p)",
    "hard swish": "g = Add(p, c)  h = Clip(g, c, c)  i = Mul(p, h)  r = Div(i, c)",
    "squeeze and excite": "g = GlobalAveragePool(p)  h = Conv(g, e)  i = Relu(h)  j = Conv(i, f)  k = Sigmoid(j)  r = Mul(p, k)",
}


@pytest.mark.parametrize("case", ACTIVATIONS)
def test_activations_and_gates_between(case: str) -> None:
    m = model(
        f"p = Conv{DEPTHWISE}(x, a)  {ACTIVATIONS[case]}  y = Conv(r, b)",
        a=(8, 1, 3, 3), b=(12, 8, 1, 1), c=(), e=(2, 8, 1, 1), f=(8, 2, 1, 1),
    )  # fmt: skip
    assert found(m) == [("separable", "p y", "3×3 depthwise, 8 → 12 channels")]


def test_what_stands_between_matters() -> None:
    weights = {"a": (8, 1, 3, 3), "b": (12, 8, 1, 1)}
    assert found(model(f"p = Conv{DEPTHWISE}(x, a)  q = GlobalAveragePool(p)  y = Conv(q, b)", **weights)) == []
    assert found(model(f"p = Conv{DEPTHWISE}(x, a)  q = Add(p, x)  z = Tanh(q)  y = Conv(q, b)", **weights)) == [
        ("residual", "p q", "8 → 8 channels, added to the input")
    ]


@pytest.mark.parametrize(
    ("width", "group", "kind", "detail"),
    [
        (4, 1, "bottleneck", "8 → 4 → 8 channels, 3×3"),
        (4, 2, "grouped bottleneck", "8 → 4 → 8 channels, 3×3, 2 groups"),
        (24, 24, "inverted bottleneck", "8 → 24 → 8 channels, 3×3, 24 groups"),
    ],
)
def test_bottlenecks(width: int, group: int, kind: str, detail: str) -> None:
    m = model(
        f"p = Conv(x, a)  q = Relu(p)  r = Conv<pads=[1,1,1,1], group={group}>(q, b)  s = Relu(r)  y = Conv(s, c)",
        a=(width, 8, 1, 1), b=(width, width // group, 3, 3), c=(8, width, 1, 1),
    )  # fmt: skip
    assert (kind, "p r y", detail) in found(m)


def test_parallel() -> None:
    m = model(
        f"""p = Conv{PAD}(x, a)  q = {NORM.format('p')}  r = Conv(x, b)  s = {NORM.format('x')}
        t = Add(q, r)  u = Add(t, s)  y = Relu(u)""",
        a=(8, 8, 3, 3), b=(8, 8, 1, 1), n=(8,),
    )  # fmt: skip
    assert found(m) == [("parallel", "p r u", "3×3 + 1×1 + identity, 8 → 8 channels")]


@pytest.mark.parametrize("end", ["Sum", "Concat<axis=1>"])
def test_branches(end: str) -> None:
    lines = [f"p{i} = Conv(x, a{i})  q{i} = Relu(p{i})  r{i} = Conv{PAD}(q{i}, b{i})".replace("@", "") for i in "123"]
    weights = {f"{n}{i}": s for i in "123" for n, s in (("a", (4, 8, 1, 1)), ("b", (4, 4, 3, 3)))}
    how = "added" if end == "Sum" else "concatenated"
    assert found(model(f"{' '.join(lines)} y = {end}(r1, r2, r3)", **weights)) == [
        ("branches", "p1 r1 p2 r2 p3 r3 y", f"3 branches of 8 → 4 → 4 channels, {how}")
    ]


def test_residual_units() -> None:
    weights = {"a": (8, 8, 3, 3), "b": (8, 8, 3, 3), "c": (8, 8, 1, 1), "n": (8,)}
    plain = f"p = Conv{PAD}(x, a)  q = Relu(p)  r = Conv{PAD}(q, b)"
    (unit,) = found(model(f"{plain}  s = Add(x, r)  y = Relu(s)", **weights))
    assert unit == ("residual", "p r s", "8 → 8 → 8 channels, added to the input")
    (unit,) = found(model(f"{plain}  t = Conv(x, c)  s = Add(r, t)  y = Relu(s)", **weights))
    assert unit == ("residual", "p r t s", "8 → 8 → 8 channels, added to one convolution of the input")


def test_pre_activation_units() -> None:
    """He et al., Identity Mappings: norm and activation read the sum, and the sum goes on unchanged."""
    unit = (
        "n@ = BatchNormalization(x@, n, n, n, n)  r@ = Relu(n@)  p@ = Conv<pads=[1,1,1,1]>(r@, a)"
        "  m@ = BatchNormalization(p@, n, n, n, n)  s@ = Relu(m@)  q@ = Conv<pads=[1,1,1,1]>(s@, b)  x% = Add(q@, x@)"
    )
    body = "x1 = Identity(x) " + " ".join(unit.replace("@", str(i)).replace("%", str(i + 1)) for i in (1, 2))
    m = model(f"{body}  y = Relu(x3)", a=(8, 8, 3, 3), b=(8, 8, 3, 3), n=(8,))
    assert found(m) == [
        ("pre-activation residual", f"p{i} q{i} x{i + 1}", "8 → 8 → 8 channels, added to the input") for i in (1, 2)
    ]


def test_a_chain_of_sums_takes_linear_time() -> None:
    lines = [f"p{i} = Conv(x{i}, a)  x{i + 1} = Add(p{i}, x{i})" for i in range(800)]
    m = model(f"x0 = Relu(x) {' '.join(lines)} y = Relu(x800)", a=(8, 8, 1, 1))
    assert len(found(m)) == 800


REAL = {
    "open-nsfw": {"bottleneck": 16, "residual": 16},
    "ppocr-cls": {"inverted bottleneck": 2},
    "ppocr-v6-det": {"separable": 17, "residual": 10},
    "layout": {"separable": 37},
    "orientation": {"separable": 13},
    "yolov8n": {"residual": 6},
}


@pytest.mark.real
@pytest.mark.parametrize("key", REAL)
def test_real_models(key: str) -> None:
    counts = collections.Counter(s.kind for s in conv_structures(ir.load(catalogue.fetch(key))))
    assert counts.items() >= REAL[key].items()
