"""residual-sum: residual additions before a LayerNormalization, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from exactness import assert_exact, op_types, parse
from fake_profiles import Ratio, fake

from graphopt.analysis import profile as profiles
from graphopt.passes.lower.residual_sum import ResidualSum
from graphopt.recipe import load

TEXT = """<ir_version: 10, opset_import: ["": 21]>
g (float[b, s, 4] x, float[b, s, 4] r) => (float[b, s, 4] y, float[b, s, 4] a)
<float[4] w = {1, 2, 3, 4}, float[4] c = {0, 1, 2, 3}> {
  %s
  y = LayerNormalization<axis = -1>(a, w, c)
}"""


@pytest.fixture(autouse=True)
def recent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default is that of a recent ONNX Runtime, whichever is installed."""
    monkeypatch.setattr(profiles, "_installed", lambda: (1, 31))


@pytest.mark.parametrize("version", [(1, 22), (1, 29), None])
def test_an_older_runtime_fuses_faster(monkeypatch: pytest.MonkeyPatch, version: tuple[int, int] | None) -> None:
    monkeypatch.setattr(profiles, "_installed", lambda: version)
    for body in ("a = Add(x, r)", "a = Sum(x, r)"):
        assert op_types(assert_exact(parse(TEXT % body), ResidualSum()))[0] == "Add"


def test_residual() -> None:
    after = assert_exact(parse(TEXT % "a = Add(x, r)"), ResidualSum())
    assert op_types(after) == ["Sum", "LayerNormalization"]
    assert [v.name for v in after.graph.outputs] == ["y", "a"]


@pytest.mark.parametrize("body", ["a = Add(x, c)", "a = Mul(x, r)", "a = Sub(x, r)"])
def test_left(body: str) -> None:
    model = parse(TEXT % body)
    assert not ResidualSum()(model).modified


@pytest.mark.parametrize(("dtype", "changed"), [("double", False), ("float16", True), ("bfloat16", True)])
def test_other_types(dtype: str, changed: bool) -> None:
    model = parse((TEXT % "a = Add(x, r)").replace("float[", f"{dtype}["))
    assert ResidualSum()(model).modified == changed


def test_for_the_cpu_only() -> None:
    assert "residual-sum" in [getattr(p, "name", "") for p in load("exact").passes("cpu")]
    for target in ("cuda", "portable"):
        assert "residual-sum" not in [getattr(p, "name", "") for p in load("exact").passes(target)]


def test_onnx_runtime_no_longer_fuses_it(tmp_path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime isn't installed")
    for lower, expected in ((False, "SkipLayerNormalization"), (True, "LayerNormalization")):
        model = parse(TEXT.replace(", float[b, s, 4] a)", ")") % "a = Add(x, r)")
        if lower:
            ResidualSum()(model)
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "o.onnx")
        options.log_severity_level = 4
        session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
        feed = np.ones((1, 2, 4), np.float32)
        session.run(None, {"x": feed, "r": feed})
        assert expected in [n.op_type for n in ir.load(tmp_path / "o.onnx").graph]


# ---- with a target profile


def lowered(text: str, ratio: Ratio | float) -> list[str]:
    rule = ResidualSum()
    rule.profile = fake("residual-norm", ratio)
    return op_types(assert_exact(parse(text), rule))


WIDTH = 128
"""Of the sites that a profile is asked about: a width that was measured."""
NUMBERS = ", ".join(["0.5"] * WIDTH)
WIDE = TEXT.replace("{1, 2, 3, 4}", f"{{{NUMBERS}}}").replace("{0, 1, 2, 3}", f"{{{NUMBERS}}}")
WIDE = WIDE.replace("float[4]", f"float[{WIDTH}]").replace("s, 4]", f"s, {WIDTH}]")


def test_the_profile_decides() -> None:
    assert lowered(WIDE % "a = Add(x, r)", 1.5)[0] == "Sum"
    assert lowered(WIDE % "a = Add(x, r)", 0.8)[0] == "Add"
    assert lowered(WIDE % "a = Sum(x, r)", 0.8)[0] == "Add"
    assert lowered(WIDE % "a = Sum(x, r)", 1.5)[0] == "Sum"


def test_it_is_asked_at_the_width_of_the_site() -> None:
    assert lowered(WIDE % "a = Add(x, r)", lambda rows, width, threads: 0.5 if width == WIDTH else 1.5)[0] == "Add"
    assert lowered(WIDE % "a = Add(x, r)", lambda rows, width, threads: 1.5 if width == WIDTH else 0.5)[0] == "Sum"
    # Five factors of two below what was measured nothing is certain.
    assert lowered(TEXT % "a = Add(x, r)", 0.5)[0] == "Sum"


def test_it_is_asked_at_the_rows_that_the_graph_fixes() -> None:
    def one_row_is_fast(rows: int, width: int, threads: int) -> float:
        return 0.5 if rows == 1 else 1.5

    assert lowered(WIDE % "a = Add(x, r)", one_row_is_fast)[0] == "Sum"
    assert lowered(WIDE.replace("b, s,", "1, 1,") % "a = Add(x, r)", one_row_is_fast)[0] == "Add"
    assert lowered(WIDE.replace("b, s,", "2, 64,") % "a = Add(x, r)", one_row_is_fast)[0] == "Sum"


def test_a_sum_of_three_or_with_a_constant_stays() -> None:
    for body in ("a = Sum(x, r, r)", "a = Sum(x, c)"):
        assert lowered(WIDE % body, 0.8)[0] == "Sum"


@pytest.mark.real
def test_on_a_real_encoder() -> None:
    import graphopt
    from graphopt.models import catalogue

    names = ["lift-constants", "convert-opset", "fold-constants", "raise-layer-norm", "residual-sum"]
    for ratio, expected in ((1.5, 7), (0.5, 0)):
        result = graphopt.optimize(
            catalogue.fetch("paraphrase-minilm"), {"passes": names}, profile=fake("residual-norm", ratio)
        )
        assert result.report.ok
        assert [n.op_type for n in result.model.graph].count("Sum") == expected
