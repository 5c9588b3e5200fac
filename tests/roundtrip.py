"""How a test sends an unusual model through the exact recipe, from file to file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import onnx.reference

import graphopt
from graphopt.verification.compare import compare

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def text(body: str, head: str = HEAD) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{head}\n{body}")


def outputs(proto: onnx.ModelProto, feeds: dict[str, Any], *, reference: bool = False) -> list[Any]:
    if reference:
        return onnx.reference.ReferenceEvaluator(proto).run(None, feeds)
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    return ort.InferenceSession(proto.SerializeToString(), options).run([o.name for o in proto.graph.output], feeds)


def through(
    proto: onnx.ModelProto,
    tmp_path: Path,
    feeds: dict[str, Any] | None = None,
    *,
    verify: str = "pass",
    reference: bool = False,
    random: bool = False,
) -> onnx.ModelProto:
    """Optimize from file to file, twice, and compare; returns the result."""
    path, first, second = (tmp_path / f"{n}.onnx" for n in ("model", "first", "second"))
    onnx.save(proto, path)
    result = graphopt.optimize(path, verify=verify)
    assert [f"{r.name}: {r.detail}" for r in result.report.run.rolled_back] == []
    if verify != "none" and result.report.run.modified and not random:
        assert result.report.run.verdict.ok
    result.save(first)
    after = onnx.load(first)
    onnx.checker.check_model(after)
    assert [v.name for v in after.graph.output] == [v.name for v in proto.graph.output]
    again = graphopt.optimize(first, verify="none")
    assert [r.name for r in again.report.run.records if r.status == "applied"] == []
    again.save(second)
    assert second.read_bytes() == first.read_bytes()
    if feeds is not None and not random:
        expected, got = (outputs(p, feeds, reference=reference) for p in (proto, after))
        names = [o.name for o in proto.graph.output]
        assert [c for c in compare(expected, got, names) if not c.ok] == []
    return after


def ops(proto: onnx.ModelProto) -> Counter[str]:
    return Counter(n.op_type for n in proto.graph.node)
