"""`fold-norm-affine`: what the group of readers takes, proved in float64, and what stays with which reason."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types

from graphopt.pass_manager import PassManager
from graphopt.passes.fold import layers
from graphopt.passes.fold.norm_affine import FoldNormAffine
from graphopt.recipe import load

TYPES = {"double": np.float64, "float": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
LN = "n = LayerNormalization(x, g, b)"
RMS = "n = RMSNormalization(x, g)"


def model(
    graph: str, dtype: str = "double", opset: int = 23, functions: str = "", **weights: tuple[int, ...]
) -> ir.Model:
    """A model from text with random weights of the given shapes."""
    imports = ', "local" : 1, "com.microsoft" : 1'
    text = f'<ir_version: 10, opset_import: ["" : {opset}{imports}]> g {graph.replace("T[", dtype + "[")} {functions}'
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        tensor = ir.tensor(rng.normal(size=shape).astype(TYPES[dtype]), name=name)
        proto.graph.initializer.append(ir.to_proto(tensor))
    return ir.from_proto(proto)


def norms(m: ir.Model) -> list[ir.Node]:
    return [node for graph in (m.graph, *m.graph.subgraphs()) for node in graph if "Normalization" in node.op_type]


def assert_plain(m: ir.Model) -> None:
    """All norms have a gain of ones, one array for all of them, and add nothing."""
    for node in norms(m):
        np.testing.assert_array_equal(node.inputs[1].const_value.numpy(), 1)
        if len(node.inputs) > 2:
            np.testing.assert_array_equal(node.inputs[2].const_value.numpy(), 0)
    assert len({node.inputs[1] for node in norms(m)}) == 1


def reason(m: ir.Model, **options: bool) -> str:
    """Why the one site of `m` is left; `m` stays as it was."""
    before = ir.to_proto(m).SerializeToString(deterministic=True)
    rule = FoldNormAffine(**options)
    assert not rule(m).modified
    assert ir.to_proto(m).SerializeToString(deterministic=True) == before
    (site,) = rule.sites
    assert site.outcome == "left"
    return site.detail


# One line a case: the graph, the shapes of its weights, the operators after.
FOLDED: dict[str, tuple[str, dict[str, tuple[int, ...]], list[str]]] = {
    "q, k and v": (
        f"(T[N,S,4] x) => (T[N,S,6] q, T[N,S,6] k, T[N,S,5] v) {{ {LN}  q0 = MatMul(n, w)  q = Add(a, q0)"
        "  k0 = MatMul(n, u)  k = Add(k0, a)  v0 = MatMul(n, p)  v = Add(v0, c) }",
        {"w": (4, 6), "u": (4, 6), "p": (4, 5), "a": (6,), "c": (5,)},
        ["LayerNormalization", "MatMul", "Add", "MatMul", "Add", "MatMul", "Add"],
    ),
    "without bias": (
        f"(T[N,S,4] x) => (T[N,S,6] y) {{ {LN}  y = MatMul(n, w) }}",
        {"w": (4, 6)},
        ["LayerNormalization", "MatMul", "Add"],
    ),
    "gate and up": (
        f"(T[N,S,4] x) => (T[N,S,6] y) {{ {RMS}  p = MatMul(n, w)  q = MatMul(n, u)  s = Sigmoid(p)  y = Mul(s, q) }}",
        {"w": (4, 6), "u": (4, 6)},
        ["RMSNormalization", "MatMul", "MatMul", "Sigmoid", "Mul"],
    ),
    "gemm": (
        f"(T[N,4] x) => (T[N,6] y) {{ {LN}  y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(n, w, a) }}",
        {"w": (6, 4), "a": (6,)},
        ["LayerNormalization", "Gemm"],
    ),
    "a gain of one number": (
        f"(T[N,S,4] x) => (T[N,S,6] y) {{ {LN}  y = MatMul(n, w) }}",
        {"w": (4, 6), "g": (1,)},
        ["LayerNormalization", "MatMul", "Add"],
    ),
    "a gain that nobody folded": (
        "(T[N,S,4] x) => (T[N,S,6] y) { h = Add(one, g)  n = RMSNormalization<axis = 2>(x, h)  y = MatMul(n, w) }",
        {"w": (4, 6), "one": (1,)},
        ["RMSNormalization", "MatMul"],
    ),
    "one token": (
        f"(T[N,S,4] x) => (T[N,6] y) {{ {LN}  i = Constant<value = int64 {{0}}>()  t = Gather<axis = 1>(n, i)"
        "  m = MatMul(t, w)  y = Add(m, a) }",
        {"w": (4, 6), "a": (6,)},
        ["LayerNormalization", "Gather", "MatMul", "Add"],
    ),
    "the last tokens, as rows": (
        f"(T[2,3,4] x) => (T[4,6] y) {{ {LN}  o = Constant<value_ints = [1]>()  e = Constant<value_ints = [3]>()"
        "  t = Slice(n, o, e, o)  f = Constant<value_ints = [-1, 4]>()  r = Reshape(t, f)  y = Gemm(r, w, a) }",
        {"w": (4, 6), "a": (6,)},
        ["LayerNormalization", "Slice", "Reshape", "Gemm"],
    ),
    "channels first": (
        f"(T[N,S,4] x) => (T[N,6,S] y) {{ {LN}  t = Transpose<perm = [0, 2, 1]>(n)  y = Conv(t, w) }}",
        {"w": (6, 4, 1)},
        ["LayerNormalization", "Transpose", "Conv"],
    ),
    "instances": (
        "(T[N,4,5] x) => (T[N,6,3] y) { n = InstanceNormalization(x, g, b)  y = Conv(n, w, a) }",
        {"w": (6, 4, 3), "a": (6,)},
        ["InstanceNormalization", "Conv"],
    ),
    "groups": (
        "(T[N,4,5] x) => (T[N,6,3] y) { n = GroupNormalization<num_groups = 2>(x, g, b)"
        "  y = Conv<group = 2>(n, w, a) }",
        {"w": (6, 2, 3), "a": (6,)},
        ["GroupNormalization", "Conv"],
    ),
}


@pytest.mark.parametrize("case", FOLDED)
def test_goes_into_the_group_of_readers(case: str) -> None:
    graph, weights, expected = FOLDED[case]
    m = model(graph, **{"g": (4,), "b": (4,), **weights})
    after = assert_exact(m, FoldNormAffine(), dims={"N": 2, "S": 3})
    assert op_types(after) == expected
    assert_plain(after)
    assert not [node for node in norms(after) if node.op_type in ("LayerNormalization",) and len(node.inputs) > 2]


def test_onnx_runtimes_own_norm() -> None:
    m = model(
        "(T[2,3,4] x) => (T[2,3,6] y) { n = com.microsoft.SimplifiedLayerNormalization(x, g)  y = MatMul(n, w) }",
        g=(4,),
        w=(4, 6),
    )
    gain, weight = (m.graph.initializers[name].const_value.numpy().astype(np.float64) for name in "gw")
    assert FoldNormAffine()(m).modified
    assert_plain(m)
    got = m.graph.initializers["w"].const_value.numpy()
    np.testing.assert_array_equal(got, weight * gain[:, None])


def test_norms_of_one_width_share_their_ones() -> None:
    layer = "n{0} = RMSNormalization(x{0}, g{0})  y{0} = MatMul(n{0}, w{0})  x{1} = Add(x{0}, y{0})"
    body = "  ".join(layer.format(i, i + 1) for i in range(3))
    weights = {f"{k}{i}": s for i in range(3) for k, s in {"g": (4,), "w": (4, 4)}.items()}
    after = assert_exact(model(f"(T[N,4] x0) => (T[N,4] x3) {{ {body} }}", **weights), FoldNormAffine())
    assert_plain(after)
    assert len(after.graph.initializers) == 4


def test_large_weights_are_lazy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.graph.computed.LAZY_BYTES", 0)
    monkeypatch.setattr(layers, "_CHUNK", 5)
    for case in ("q, k and v", "gemm", "groups"):
        graph, weights, _ = FOLDED[case]
        m = model(graph, **{"g": (4,), "b": (4,), **weights})
        after = assert_exact(m, FoldNormAffine(), dims={"N": 2, "S": 3})
        assert isinstance(after.graph.initializers["w"].const_value, ir.LazyTensor)


@pytest.mark.parametrize("dtype", ["float", "float16", "bfloat16"])
def test_weights_are_rounded_once(dtype: str) -> None:
    m = model(
        f"(T[N,4] x) => (T[N,6] y) {{ {LN}  m = MatMul(n, w)  y = Add(m, a) }}", dtype, w=(4, 6), a=(6,), g=(4,), b=(4,)
    )
    w, a, g, b = (m.graph.initializers[k].const_value.numpy().astype(np.float64) for k in "wagb")
    assert FoldNormAffine()(m).modified
    got = {k: m.graph.initializers[k].const_value.numpy() for k in "wa"}
    assert got["w"].dtype == got["a"].dtype == norms(m)[0].inputs[1].const_value.numpy().dtype == TYPES[dtype]
    np.testing.assert_array_equal(got["w"], (w * g[:, None]).astype(TYPES[dtype]))
    np.testing.assert_array_equal(got["a"], (a + (w * b[:, None]).sum(axis=0)).astype(TYPES[dtype]))


TIED = (
    "(T[N,S,4] x, int64[N,S] i) => (T[N,S,7] y, T[N,S,4] e) {"
    f" e = Gather(w, i)  {RMS}  t = Transpose<perm = [1, 0]>(w)  y = MatMul(n, t) }}"
)


def test_a_tied_output_layer_is_untied_only_where_asked() -> None:
    m = model(TIED, w=(7, 4), g=(4,))
    m.graph[0].name = "embedding"
    assert "are shared with Gather 'embedding'" in reason(m)
    after = assert_exact(m, FoldNormAffine(untie=True), dims={"N": 2, "S": 3})
    assert op_types(after) == ["Gather", "RMSNormalization", "MatMul"]
    assert_plain(after)


def test_a_transposed_weight_that_nobody_shares_needs_no_option() -> None:
    graph = f"(T[N,S,4] x) => (T[N,S,7] y) {{ {RMS}  t = Transpose(w)  y = MatMul(n, t) }}"
    after = assert_exact(model(graph, w=(7, 4), g=(4,)), FoldNormAffine(), dims={"N": 2, "S": 3})
    assert op_types(after) == ["RMSNormalization", "MatMul"]


LEFT: dict[str, tuple[str, dict[str, tuple[int, ...]], str]] = {
    "post-norm": (
        f"(T[N,4] x) => (T[N,4] y) {{ {LN}  m = MatMul(n, w)  y = Add(n, m) }}",
        {"w": (4, 4)},
        "post-norm: the addition '' reads it and needs the gain",
    ),
    "behind a branch, as in Gemma": (
        f"(T[N,4] x, T[N,4] z) => (T[N,4] y) {{ {RMS}  y = Add(z, n) }}",
        {},
        "post-norm: the addition '' reads it and needs the gain",
    ),
    "an activation": (
        f"(T[N,4] x) => (T[N,6] y) {{ {LN}  r = Gelu(n)  y = MatMul(r, w) }}",
        {"w": (4, 6)},
        "Gelu '' has no weights to fold into",
    ),
    "a graph output": (
        f"(T[N,4] x) => (T[N,6] y, T[N,4] n) {{ {LN}  y = MatMul(n, w) }}",
        {"w": (4, 6)},
        "'n' is a graph output",
    ),
    "shared weights": (
        f"(T[N,4] x) => (T[N,6] y, T[N,6] z) {{ {LN}  y = MatMul(n, w)  z = MatMul(x, w) }}",
        {"w": (4, 6)},
        "the weights of MatMul '' are shared with MatMul ''",
    ),
    "computed weights": (
        f"(T[N,4] x, T[4,6] w) => (T[N,6] y) {{ {LN}  y = MatMul(n, w) }}",
        {},
        "the weights of MatMul '' aren't constant",
    ),
    "as the weights": (
        f"(T[N,4] x) => (T[6,4] y) {{ {LN}  y = MatMul(w, n) }}",
        {"w": (6, 3)},
        "the weights of MatMul '' aren't constant",
    ),
    "two axes": (
        "(T[N,3,4] x) => (T[N,3,6] y) { n = LayerNormalization<axis = 1>(x, g, b)  y = MatMul(n, w) }",
        {"w": (4, 6), "g": (3, 4), "b": (3, 4)},
        "normalises more than one axis",
    ),
    "a computed gain": (
        "(T[N,4] x, T[4] h) => (T[N,6] y) { n = LayerNormalization(x, h, b)  y = MatMul(n, w) }",
        {"w": (4, 6)},
        "its gain or bias isn't constant",
    ),
    "a padded convolution": (
        "(T[N,4,5] x) => (T[N,6,5] y) { n = InstanceNormalization(x, g, b)  y = Conv<pads = [1, 1]>(n, w) }",
        {"w": (6, 4, 3)},
        "pads its input with zeros",
    ),
    "the split of heads": (
        f"(T[2,3,4] x) => (T[2,3,2,5] y) {{ {LN}  s = Constant<value_ints = [0, 0, 2, 2]>()  h = Reshape(n, s)"
        "  y = MatMul(h, w) }",
        {"w": (2, 5)},
        "Reshape '' has no weights to fold into",
    ),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_with_its_reason(case: str) -> None:
    graph, weights, expected = LEFT[case]
    assert expected in reason(model(graph, **{"g": (4,), "b": (4,), **weights}))


def test_no_new_additions_where_they_are_not_wanted() -> None:
    m = model(f"(T[N,4] x) => (T[N,6] y) {{ {LN}  y = MatMul(n, w) }}", w=(4, 6), g=(4,), b=(4,))
    assert "new_bias is off" in reason(m, new_bias=False)
    graph, weights, expected = FOLDED["q, k and v"]
    after = assert_exact(model(graph, g=(4,), b=(4,), **weights), FoldNormAffine(new_bias=False))
    assert op_types(after) == expected


def test_a_gain_for_each_group_of_channels() -> None:
    m = model(
        "(T[N,4,5] x) => (T[N,6,5] y) { n = GroupNormalization<num_groups = 2>(x, g, b)  y = Conv(n, w) }",
        opset=18,
        g=(2,),
        b=(2,),
        w=(6, 4, 1),
    )
    assert "one number a group before opset 21" in reason(m)


def test_overridable_gain() -> None:
    m = model(f"(T[N,4] x) => (T[N,6] y) {{ {RMS}  y = MatMul(n, w) }}", g=(4,), w=(4, 6))
    m.graph.inputs.append(m.graph.initializers["g"])
    assert "isn't constant" in reason(m)


@pytest.mark.parametrize(("factor", "why"), [(6e4, "would overflow float16"), (1e-6, "would lose precision")])
def test_float16_that_cannot_hold_the_product(factor: float, why: str) -> None:
    m = model(f"(T[N,4] x) => (T[N,6] y) {{ {RMS}  y = MatMul(n, w) }}", "float16", g=(4,), w=(4, 6))
    for name, number in (("g", factor), ("w", 100.0 if factor > 1 else 1e-2)):
        value = m.graph.initializers[name]
        value.const_value = ir.tensor(np.full(value.const_value.shape.numpy(), number, np.float16), name=name)
    assert why in reason(m)


def test_ones_already_are_no_site() -> None:
    m = model(f"(T[N,4] x) => (T[N,4] y) {{ {RMS}  y = Relu(n) }}", g=(4,))
    m.graph.initializers["g"].const_value = ir.tensor(np.ones(4), name="g")
    rule = FoldNormAffine()
    assert not rule(m).modified
    assert rule.sites == []


def test_in_subgraphs_and_functions() -> None:
    m = model(
        f"""(T[N,4] x, bool k) => (T[P,Q] y) {{
        y = If(k) <then_branch = yes () => (T[P,Q] p) {{ {LN}  p = MatMul(n, w) }},
            else_branch = no () => (T[P,Q] p) {{ p = Relu(x) }}> }}""",
        w=(4, 4),
        g=(4,),
        b=(4,),
    )
    for chosen in (True, False):
        feeds = {"x": np.random.default_rng(1).normal(size=(2, 4)), "k": np.array(chosen)}
        after = assert_exact(m, FoldNormAffine(), feeds=feeds)
    assert_plain(after)
    # A reader in a branch runs only there: the norm stays as it is.
    split = model(
        f"""(T[N,4] x, bool k) => (T[P,Q] y) {{ {LN}
        y = If(k) <then_branch = yes () => (T[P,Q] p) {{ p = MatMul(n, w) }},
            else_branch = no () => (T[P,Q] p) {{ p = Relu(x) }}> }}""",
        w=(4, 4),
        g=(4,),
        b=(4,),
    )
    assert "MatMul '' is in an inner graph" in reason(split)
    function = """<domain: "local", opset_import: ["" : 23]> Block (x) => (y) {
        w = Constant<value = double[2,2] {3, 1, 2, 4}>()  g = Constant<value = double[2] {2, 5}>()
        n = LayerNormalization(x, g, g)  y = MatMul(n, w) }"""
    after = assert_exact(model("(T[N,2] x) => (T[N,2] y) { y = local.Block(x) }", functions=function), FoldNormAffine())
    (block,) = after.functions.values()
    assert [n.op_type for n in block if n.op_type != "Constant"] == ["LayerNormalization", "MatMul", "Add"]


# ---- what transformers exports


def _decoder(config: str, model_class: str, **options: Any) -> Any:
    import transformers

    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    return getattr(transformers, model_class)(getattr(transformers, config)(**{**sizes, **options}))


NETWORKS: dict[str, tuple[Callable[[], Any], int, str]] = {
    # How many norms fold, and why the others don't.
    "llama": (lambda: _decoder("LlamaConfig", "LlamaForCausalLM"), 5, ""),
    "gemma2": (lambda: _decoder("Gemma2Config", "Gemma2ForCausalLM", head_dim=8), 5, "post-norm"),
    "bert": (
        lambda: _decoder("BertConfig", "BertModel", num_key_value_heads=None, max_position_embeddings=64),
        0,
        "post-norm",
    ),
}


def _export(module: Any, script: bool) -> ir.Model:
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, ids: Any) -> Any:
            return self.model(ids, attention_mask=torch.ones_like(ids))[0]

    torch.manual_seed(0)
    for parameter in module.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 0.7, 0.3)
    ids, names = torch.randint(0, 64, (2, 7)), {"input_names": ["ids"], "output_names": ["logits"]}
    logging.disable(logging.WARNING)
    try:
        if script:
            buffer, axes = io.BytesIO(), {"ids": {0: "batch", 1: "sequence"}}
            torch.onnx.export(
                Logits().eval(), (ids,), buffer, dynamo=False, opset_version=17, dynamic_axes=axes, **names
            )
            return ir.from_proto(onnx.load_from_string(buffer.getvalue()))
        shapes = {"ids": {0: "batch", 1: "sequence"}}
        program = torch.onnx.export(
            Logits().eval(), (ids,), dynamo=True, opset_version=20, dynamic_shapes=shapes, **names
        )
        return ir.from_proto(program.model_proto)
    finally:
        logging.disable(logging.NOTSET)


@pytest.mark.export
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("network", "script"), [("llama", False), *((network, True) for network in NETWORKS)])
def test_what_transformers_exports(network: str, script: bool) -> None:
    pytest.importorskip("transformers")
    ort = pytest.importorskip("onnxruntime")
    make, folded, why = NETWORKS[network]
    module = make()
    module.config.use_cache = False
    m = _export(module, script)
    PassManager(load().passes(), verifier_of=None)(m)
    quiet = ort.SessionOptions()
    quiet.log_severity_level = 3

    def outputs() -> np.ndarray:
        session = ort.InferenceSession(ir.to_proto(m).SerializeToString(), quiet, providers=["CPUExecutionProvider"])
        return session.run(None, {"ids": np.random.default_rng(0).integers(0, 64, size=(3, 5))})[0]

    before, rule = outputs(), FoldNormAffine()
    rule(m)
    outcomes = [site.outcome for site in rule.sites]
    assert outcomes.count("applied") == folded
    others = [site.detail for site in rule.sites if site.outcome == "left" and why not in site.detail]
    assert [detail for detail in others if "graph output" not in detail] == []
    np.testing.assert_allclose(outputs(), before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


@pytest.mark.real
def test_real_model() -> None:
    """The two pre-norm blocks of PP-OCR v4's recognizer and its last norm, all of which only layers read."""
    ort = pytest.importorskip("onnxruntime")
    from graphopt.models import catalogue

    m = ir.load(catalogue.fetch("ppocr-v4-rec"))
    names = [getattr(p, "name", "") for p in load().passes()]
    before = [n for n in names[: names.index("raise-rms-norm")] if n != "softmax-guard"]
    PassManager(load({"passes": before}).passes(), verifier_of=None)(m)
    data = np.random.default_rng(0).normal(size=(2, 3, 48, 160)).astype(np.float32)
    results = []
    for _ in range(2):
        quiet = ort.SessionOptions()
        quiet.log_severity_level = 3
        session = ort.InferenceSession(ir.to_proto(m).SerializeToString(), quiet, providers=["CPUExecutionProvider"])
        results.append(session.run(None, {m.graph.inputs[0].name: data})[0])
        rule = FoldNormAffine()
        rule(m)
        assert [site.outcome for site in rule.sites] == (["applied"] * 5 if len(results) == 1 else [])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-4, atol=2e-5)
