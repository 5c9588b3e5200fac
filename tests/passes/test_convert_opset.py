"""`convert-opset`: what it converts, what it leaves and why, and the standard's own test cases."""

import collections
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import op_types
from opset_conversion import assert_same, convert, model, random_feeds, refused, run

from graphopt.errors import UsageError
from graphopt.passes.raise_ import convert_opset
from graphopt.passes.raise_.convert_opset import ConvertOpset
from graphopt.passes.raise_.opset_steps import ADAPTERS, COMPATIBLE, WITHOUT_KERNEL


@pytest.mark.parametrize("version", [10, 11, 12, 13, 15, 17, 18, 20, 21, 22, 24])
def test_every_version_can_be_the_target(version: int) -> None:
    m = model(
        9,
        """(float[N,3,4,4] x) => (float[P,Q,R,S] y, float[K,L] z) <float[4] s = {1, 1, 2, 2}> {
            a = Upsample(x, s)  b = Softmax<axis = 1>(a)  c = Clip<min = 0.01>(b)  d = Pad<pads = [0,0,1,1,0,0,1,1]>(c)
            e, f = Split<axis = 0>(d)  y = Slice<axes = [1], starts = [0], ends = [2]>(e)
            g = ReduceMean<axes = [2], keepdims = 0>(f)  h = ReduceSum<axes = [2], keepdims = 0>(g)
            i = Unsqueeze<axes = [0]>(h)  j = Squeeze<axes = [0]>(i)  z, t = TopK<k = 2>(j) }""",
    )
    after, _ = convert(m, version, N=2)
    assert "Upsample" not in op_types(after)


def test_float64_bounds_are_those_of_float32() -> None:
    m = model(7, "(double[N,4] x) => (double[N,4] y) { y = Clip(x) }")
    ConvertOpset()(m)
    low, high = (v.const_value.numpy() for v in next(iter(m.graph)).inputs[1:])
    assert (low, high) == (np.finfo(np.float32).min, np.finfo(np.float32).max)
    assert low.dtype == np.float64


FUNCTION_CALL = """(float[N,3,4] x, bool c) => (float[A,B,C] y) {
    a = local.Rows(x)
    y = If(c) <then_branch = yes () => (float[A,B,C] p) { r = ReduceMean<axes = [0]>(a)
            q = Squeeze<axes = [0]>(r)  p = Unsqueeze<axes = [0]>(q) },
        else_branch = no () => (float[A,B,C] p) { p = Identity(a) }> }"""


def test_functions_and_subgraphs() -> None:
    function = '<domain: "local", opset_import: ["" : 11]> Rows (x) => (y) { y = Softmax<axis = 1>(x) }'
    m = model(11, FUNCTION_CALL, function, ', "local" : 1')
    after, _ = convert(m, N=2)
    (rows,) = after.functions.values()
    assert [n.op_type for n in rows] == ["Shape", "Flatten", "Softmax", "Reshape"]  # a function's ranks aren't known
    assert rows.opset_imports[""] == 23
    feeds = {"x": random_feeds(m, {"N": 2})["x"]}
    for chosen in (True, False):
        assert_same(run(m, feeds | {"c": np.array(chosen)}), run(after, feeds | {"c": np.array(chosen)}))


def test_constants_inside_a_function() -> None:
    function = (
        '<domain: "local", opset_import: ["" : 9]> Rows (x) => (y) '
        "{ a = ReduceMax<axes = [1]>(x)  y = Pad<pads = [0,0,0,1,0,0], value = 0.5>(a) }"
    )
    after = convert_copy(model(11, FUNCTION_CALL, function, ', "local" : 1'))
    (rows,) = after.functions.values()
    # The element type of a function's argument isn't known either.
    assert [n.op_type for n in rows if n.op_type != "Constant"] == ["ReduceMax", "CastLike", "Pad"]
    onnx.checker.check_model(ir.to_proto(after), full_check=True)


def test_function_that_cannot_be_converted() -> None:
    function = '<domain: "local", opset_import: ["" : 11]> Rows <ax> (x) => (y) { y = ReduceSum<axes: ints = @ax>(x) }'
    m = model(11, FUNCTION_CALL.replace("(x)\n", "<ax = [1]>(x)\n", 1), function, ', "local" : 1')
    reason = refused(m)
    assert "in function 'Rows', node '' (ReduceSum of opset 11) takes its attribute 'axes' from the function" in reason


def test_element_type_that_is_not_known_below_opset_15() -> None:
    function = '<domain: "local", opset_import: ["" : 9]> Rows (x) => (y) { y = Clip<min = 0.1>(x) }'
    m = model(9, "(float[N,4] x) => (float[N,4] y) { y = local.Rows(x) }", function, ', "local" : 1')
    assert "element type, which isn't known" in refused(m, 13)
    assert [n.op_type for n in next(iter(convert_copy(m).functions.values()))] == ["Constant", "CastLike", "Clip"]


def convert_copy(m: ir.Model) -> ir.Model:
    after = m.clone()
    assert ConvertOpset()(after).modified
    return after


def test_both_names_of_the_default_domain() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 7, opset_import: ["ai.onnx" : 11]> g (float[N,4] x) => (float[N] y) '
        "{ a = Relu(x)  y = ReduceSum<axes = [1], keepdims = 0>(a) }"
    )
    proto.graph.node[0].domain = "ai.onnx"
    m = ir.from_proto(proto)
    after, _ = convert(m)
    assert dict(after.opset_imports) == {"": 23}


def test_names_of_graph_outputs_stay() -> None:
    after, _ = convert(model(9, "(float[N,3,4] x) => (float[N,3,4] y, float[N,3,4] z) { y = Softmax(x)  z = Relu(y) }"))
    assert [o.name for o in after.graph.outputs] == ["y", "z"]


def test_weights_are_not_read() -> None:
    m = model(9, "(float[N,4] x) => (float[N,500] y) { a = MatMul(x, w)  y = Softmax(a) }")

    def read() -> ir.TensorProtocol:
        raise AssertionError("the weights were read")

    value = next(iter(m.graph)).inputs[1]
    value.const_value = ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=ir.Shape([4, 500]), name="w")
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([4, 500])
    m.graph.register_initializer(value)
    assert ConvertOpset()(m).modified
    assert op_types(m) == ["MatMul", "Softmax"]


REFUSALS: dict[str, tuple[int, str, str]] = {
    "unknown operator": (
        11,
        "(float[N,4] x) => (float[N,4] y) { y = Affine(x) }",
        "not converted: node '' uses Affine, which opset 11 of the ONNX standard doesn't have",
    ),
    "opset 6": (6, "(float[N,4] x) => (float[N,4] y) { y = Relu(x) }", "opset 6 is older than 7"),
    "training": (
        9,
        """(float[N,2,3] x, float[2] s) => (float[N,2,3] y) { y, a, b, c, d = BatchNormalization(x, s, s, s, s) }""",
        "in training form",
    ),
    "per activation": (
        7,
        "(float[N,2] x, float[2] s) => (float[N,2] y) { y = BatchNormalization<spatial = 0>(x, s, s, s, s) }",
        "spatial = 0",
    ),
    "mask": (10, "(float[N,4] x) => (float[N,4] y, bool[N,4] m) { y, m = Dropout(x) }", "gives out its mask"),
    "withdrawn grid": (
        11,
        """(float[1,2,3,4] x, float[4] s) => (float[1,2,P,Q] y)
        { y = Resize<coordinate_transformation_mode = "tf_half_pixel_for_nn">(x, "", s) }""",
        "tf_half_pixel_for_nn",
    ),
    "computed scales": (
        10,
        "(float[1,2,3,4] x, float[4] s) => (float[A,B,P,Q] y) { y = Resize(x, s) }",
        "aren't constant",
    ),
    "both ways": (
        10,
        "(float[1,2,3,4] x) => (float[1,2,P,Q] y) <float[4] s = {1, 1, 2, 0.5}> { y = Resize(x, s) }",
        "enlarging one dimension",
    ),
    "sequence lengths": (
        8,
        """(float[N,M,4] x, float[N,4] s, int64[N] n) => (float[N,4] last) {
            last = Scan<num_scan_inputs = 1, body = run (float[4] a, float[4] b) => (float[4] c)
                { c = Add(a, b) }>(n, s, x) }""",
        "has sequence lengths",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_left_with_its_reason(case: str) -> None:
    opset, graph, reason = REFUSALS[case]
    assert reason in refused(model(opset, graph))


def test_one_node_holds_the_whole_model() -> None:
    m = model(11, "(float[N,4] x) => (float[N] y) { a = Foo(x)  y = ReduceSum<axes = [1], keepdims = 0>(a) }")
    next(iter(m.graph)).name = "odd"
    assert "node 'odd' uses Foo" in refused(m)


def test_a_change_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_opset, "COMPATIBLE", COMPATIBLE - {("Relu", 14)})
    convert_opset._steps.cache_clear()
    try:
        reason = refused(model(11, "(float[N,4] x) => (float[N,4] y) { y = Relu(x) }"))
    finally:
        convert_opset._steps.cache_clear()
    assert "uses Relu-13, whose change in opset 14 graphopt doesn't know" in reason


def test_operators_that_onnxruntime_lost_in_opset_22() -> None:
    m = model(
        10,
        """(float[1,2,6,6] x, float[3,4] r, int64[3] i) => (float[3,2,2,2] y)
        { y = RoiAlign<output_height = 2, output_width = 2>(x, r, i) }""",
    )
    after, rule = m.clone(), ConvertOpset()
    assert rule(after).modified
    assert after.opset_imports[""] == 21
    assert "not converted beyond opset 21" in rule.sites[0].detail
    feeds = random_feeds(m, {})
    feeds["i"][:] = 0
    assert_same(run(m, feeds), run(after, feeds))
    assert not ConvertOpset()(after).modified


def test_norms_that_onnx_runtime_has_at_every_opset() -> None:
    # What it writes where it optimized a model of opset 12 and saved it.
    text = "(float[N,4] x, %s[4] g) => (float[N,4] y, float[N,4] z) { y = LayerNormalization(x, g)  %s }"
    simplified = "z = SimplifiedLayerNormalization(x, g)"
    before = model(12, text % ("float", simplified))
    after = before.clone()
    assert ConvertOpset()(after).modified
    feeds = random_feeds(before, {"N": 2})
    assert_same(run(before, feeds), run(after, feeds))
    mixed = model(12, text % ("float16", "z = Neg(x)"))
    assert "has a scale of FLOAT16 for an input of FLOAT" in refused(mixed)


def test_no_downgrade() -> None:
    m = model(24, "(float[N,4] x) => (float[N,4] y) { y = Relu(x) }")
    assert not ConvertOpset(23)(m).modified
    assert not ConvertOpset(24)(m).modified


@pytest.mark.parametrize("version", [7, 25])
def test_version_out_of_range(version: int) -> None:
    with pytest.raises(UsageError, match=f"can't write opset {version}"):
        ConvertOpset(version)


def test_every_change_of_the_standard_is_known() -> None:
    """A new onnx that changes an operator between opsets 7 and 24 can't slip in unseen, nor can a typing error here."""
    versions = collections.defaultdict(set)
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "":
            versions[schema.name].add(schema.since_version)
    changes = {(op, v) for op, since in versions.items() for v in since if 7 < v <= 24 and any(o < v for o in since)}
    assert not (COMPATIBLE & set(ADAPTERS))
    # ONNX Runtime had LayerNormalization before the standard took it over.
    assert changes | {("LayerNormalization", 17)} == COMPATIBLE | set(ADAPTERS)


def test_the_cases_of_the_standard() -> None:
    """The onnx package's own cases of one node, from opset 7 to 22: the old and the converted model run alike."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        cases = [c for c in collect_testcases(None) if c.model is not None]
    outcomes: collections.Counter[str] = collections.Counter()
    for case in cases:
        opset = next((o.version for o in case.model.opset_import if o.domain == ""), 0)
        nodes = case.model.graph.node
        if not 7 <= opset <= 22 or not any(convert_opset._steps(n.op_type, opset, 23) for n in nodes if not n.domain):
            continue
        after = ir.from_proto(case.model)
        assert ConvertOpset()(after).modified or {(n.op_type, 22) for n in after.graph} & WITHOUT_KERNEL, case.name
        (inputs, _) = case.data_sets[0]
        feeds = dict(zip([i.name for i in case.model.graph.input], inputs, strict=False))
        try:
            expected = run(case.model, feeds)
            again = run(case.model, feeds)
            assert_same(expected, again)
        except Exception:  # not in ONNX Runtime, or random
            outcomes["not comparable"] += 1
            continue
        got = run(after, feeds)
        for e, g in zip(expected, got, strict=True):
            if isinstance(e, np.ndarray) and np.issubdtype(e.dtype, np.floating):
                # ONNX Runtime's AveragePool changed the order of its sums.
                np.testing.assert_allclose(g, e, rtol=3e-7, atol=0, err_msg=case.name)
            else:
                assert_same([e], [g])
        outcomes["equal"] += 1
    print(dict(outcomes))
    assert outcomes["equal"] > 200, outcomes


@pytest.mark.parametrize("folder", ["simple", "light"])
def test_the_models_in_the_onnx_package(folder: str) -> None:
    root = Path(onnx.__file__).parent / "backend/test/data" / folder
    converted = 0
    for path in sorted(root.rglob("*.onnx")):
        proto = onnx.load(path)
        opset = next((o.version for o in proto.opset_import if o.domain == ""), 0)
        if not 7 <= opset <= 22 or not proto.graph.node:
            continue
        after = ir.from_proto(proto)
        if ConvertOpset()(after).modified:
            converted += 1
            try:
                onnx.checker.check_model(proto, full_check=True)
            except Exception:
                continue  # broken as it came
            onnx.checker.check_model(ir.to_proto(after), full_check=True)
    assert converted > 0


REAL = {
    "ppocr-cls": (1, 3, 48, 192),
    "ppocr-v4-rec": (1, 3, 48, 64),
    "orientation": (1, 3, 224, 224),
    "open-nsfw": (1, 224, 224, 3),
    "paraphrase-minilm": (2, 9),
}


@pytest.mark.real
@pytest.mark.parametrize("key", REAL)
def test_real_models(key: str) -> None:
    from graphopt.models import catalogue

    before = ir.load(catalogue.fetch(key))
    after = before.clone()
    assert ConvertOpset()(after).modified
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    rng = np.random.default_rng(0)
    feeds = {
        value.name: np.asarray(
            rng.normal(size=REAL[key]) if value.dtype.is_floating_point() else np.ones(REAL[key]),
            dtype=value.dtype.numpy(),
        )
        for value in before.graph.inputs
    }
    for expected, got in zip(run(before, feeds), run(after, feeds), strict=True):
        # ONNX Runtime's AveragePool changed the order of its sums; without one the results are bit for bit the same.
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * np.abs(expected).max())
    assert not ConvertOpset()(after).modified
