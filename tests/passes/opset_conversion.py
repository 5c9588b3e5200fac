"""Opset conversion under test: models from text, ONNX Runtime as the judge."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from graphopt.passes.raise_.convert_opset import ConvertOpset


def model(opset: int, graph: str, functions: str = "", imports: str = "") -> ir.Model:
    text = f'<ir_version: 7, opset_import: ["" : {opset}{imports}]>\nagraph {graph}\n{functions}'
    return ir.from_proto(onnx.parser.parse_model(text))


def run(m: ir.Model | onnx.ModelProto, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    proto = ir.to_proto(m) if isinstance(m, ir.Model) else m
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, feeds)


def random_feeds(m: ir.Model, dims: dict[str, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {}
    for value in m.graph.inputs:
        shape = [d if isinstance(d, int) else dims[str(d)] for d in value.shape]
        dtype = value.dtype.numpy()
        feeds[value.name] = (
            rng.normal(size=shape).astype(dtype)
            if np.issubdtype(dtype, np.floating)
            else rng.integers(0, 2, size=shape).astype(dtype)
        )
    return feeds


def assert_same(expected: list, got: list) -> None:
    assert len(expected) == len(got)
    for e, g in zip(expected, got, strict=True):
        if isinstance(e, list):
            assert_same(e, g)
            continue
        assert np.asarray(e).dtype == np.asarray(g).dtype
        np.testing.assert_array_equal(e, g)


def convert(m: ir.Model, version: int = 23, **dims: int) -> tuple[ir.Model, ConvertOpset]:
    """Convert a copy, check it, hold its ONNX Runtime outputs equal bit for bit, and hold a second run idle."""
    after, rule = m.clone(), ConvertOpset(version)
    assert rule(after).modified
    assert after.opset_imports[""] == version
    assert after.ir_version >= 10
    proto = ir.to_proto(after)
    onnx.checker.check_model(proto, full_check=True)
    feeds = random_feeds(m, dims or {"N": 2, "M": 3})
    assert_same(run(m, feeds), run(proto, feeds))
    assert not ConvertOpset(version)(after).modified
    return after, rule


def refused(m: ir.Model, version: int = 23) -> str:
    """The reason for which `m` is left, byte for byte as it was."""
    after, rule = m.clone(), ConvertOpset(version)
    before = ir.to_proto(after).SerializeToString(deterministic=True)
    assert not rule(after).modified
    assert ir.to_proto(after).SerializeToString(deterministic=True) == before
    (site,) = rule.sites
    assert site.outcome == "left"
    return site.detail
