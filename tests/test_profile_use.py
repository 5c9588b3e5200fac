"""A target profile and session settings on their way through a run: pass, manager, API, report, session."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import ClassVar

import onnx
import onnx_ir as ir
import pytest
from exactness import op_types, parse
from fake_profiles import fake

import graphopt
from graphopt.analysis import profile as profiles
from graphopt.analysis import profile_cache
from graphopt.errors import ModelError, UsageError
from graphopt.graph.session_settings import SETTINGS_KEY
from graphopt.pass_manager import PassManager
from graphopt.passes.base import Pass
from graphopt.passes.lower.residual_sum import ResidualSum
from graphopt.report.html import render_html
from graphopt.runtime_ops.memory_session import make_session
from graphopt.verification.timing import benchmark

NUMBERS = ", ".join(["0.5"] * 128)
TEXT = f"""<ir_version: 10, opset_import: ["": 21]>
g (float[b, s, 128] x, float[b, s, 128] r) => (float[b, s, 128] y)
<float[128] w = {{{NUMBERS}}}, float[128] c = {{{NUMBERS}}}> {{
  a = Add(x, r)
  y = LayerNormalization<axis = -1>(a, w, c)
}}"""
RECIPE = {"passes": ["residual-sum"]}
FUSED, KEPT = fake("residual-norm", 0.8), fake("residual-norm", 1.5)


class AsksSession(Pass):
    """Asks for what the graph can't hold."""

    name: ClassVar[str] = "asks-session"
    family: ClassVar[str] = "lower"
    bitwise: ClassVar[bool] = True

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        changed = self.ask_session(model, "disabled_optimizers", "SkipLayerNormFusion", "its kernel is slower here")
        return self.ask_session(model, "session.dynamic_block_base", "4", "steadier") or changed


class AsksAndBreaks(AsksSession):
    """Also changes the numbers, so that it is taken back."""

    name: ClassVar[str] = "asks-and-breaks"

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        for node in list(model.graph):
            if node.op_type == "LayerNormalization" and "epsilon" not in node.attributes:
                node.attributes.add(ir.AttrFloat32("epsilon", 0.5))
                return super().apply(model) or True
        return False


@pytest.fixture(autouse=True)
def recent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The defaults are those of a recent ONNX Runtime, whichever is installed."""
    monkeypatch.setattr(profiles, "_installed", lambda: (1, 31))


# ---- profiles


def test_passes_get_the_profile() -> None:
    rule = ResidualSum()
    assert rule.profile is None
    assert rule.prefers("siblings") == "separate"
    PassManager([rule], profile=KEPT, verify="none")(parse(TEXT))
    assert rule.profile is KEPT
    rule.profile = fake("siblings", 0.5)
    assert rule.prefers("siblings", 256) == "packed"
    with pytest.raises(KeyError):
        rule.prefers("nothing", 3)


@pytest.mark.parametrize(("profile", "operator"), [(None, "Sum"), (KEPT, "Sum"), (FUSED, "Add")])
def test_optimize_follows_it_and_says_so(profile: profiles.Profile | None, operator: str) -> None:
    result = graphopt.optimize(parse(TEXT), RECIPE, profile=profile, verify="pass")
    assert result.report.ok
    assert op_types(result.model)[0] == operator
    data = result.report.to_dict()
    if profile is None:
        assert data["profile"] == "defaults"
    else:
        assert data["profile"] == {"id": profile.id, "date": profile.date, "description": profile.description}
        assert "Some CPU" not in json.dumps(data["profile"])
        assert profile.id in render_html(data)


def test_a_file_the_cache_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))
    FUSED.save(tmp_path / "p.json")
    assert op_types(graphopt.optimize(parse(TEXT), RECIPE, profile=tmp_path / "p.json").model)[0] == "Add"
    assert graphopt.optimize(parse(TEXT), RECIPE, profile="auto").report.profile is None
    runtime, cpu, cores = profile_cache.this_machine()
    dataclasses.replace(FUSED, runtime=runtime, cpu=cpu, cores=cores).save(profile_cache.cached_path())
    assert op_types(graphopt.optimize(parse(TEXT), RECIPE, profile="auto").model)[0] == "Add"
    # Only asked for: a run that doesn't name a profile is the same on every machine.
    assert op_types(graphopt.optimize(parse(TEXT), RECIPE).model)[0] == "Sum"
    assert graphopt.optimize(parse(TEXT), "clean", "portable", profile="auto").report.profile is None


def test_wrong_profiles(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        graphopt.optimize(parse(TEXT), RECIPE, profile=tmp_path / "none.json")
    with pytest.raises(UsageError, match="target cpu"):
        graphopt.optimize(parse(TEXT), "clean", "portable", profile=FUSED)


# ---- session settings


def test_what_a_pass_asks_is_reported_and_set(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime isn't installed")
    model = parse(TEXT)
    manager = PassManager([AsksSession()])
    assert manager(model).modified
    assert not manager(model).modified
    result = graphopt.optimize(model, "clean")
    settings = result.report.to_dict()["session_settings"]
    assert settings == [
        {"setting": "session.dynamic_block_base", "value": "4", "reason": "steadier"},
        {"setting": "disabled_optimizers", "value": "SkipLayerNormFusion", "reason": "its kernel is slower here"},
    ]
    page = render_html(result.report.to_dict())
    assert "its kernel is slower here" in page
    assert "disabled_optimizers=[" in page
    path = tmp_path / "m.onnx"
    result.save(path)
    for how, expected in (("graphopt", "LayerNormalization"), ("plain", "SkipLayerNormalization")):
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / f"{how}.onnx")
        options.log_severity_level = 4
        if how == "graphopt":
            session = graphopt.session(path, options)
            assert session.get_session_options().get_session_config_entry("session.dynamic_block_base") == "4"
        else:
            ort.InferenceSession(str(path), options)
        assert expected in [n.op_type for n in onnx.load(tmp_path / f"{how}.onnx").graph.node]


def test_the_callers_own_entries_stay(tmp_path: Path) -> None:
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime isn't installed")
    model = parse(TEXT)
    AsksSession()(model)
    ir.save(model, tmp_path / "m.onnx")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.dynamic_block_base", "8")
    session = graphopt.session(tmp_path / "m.onnx", options)
    assert session.get_session_options().get_session_config_entry("session.dynamic_block_base") == "8"


def test_what_is_verified_and_timed_is_what_is_asked_for(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="ONNX Runtime isn't installed")
    import numpy as np

    model = parse(TEXT)
    AsksSession()(model)
    options = make_session(model, "all").get_session_options()
    assert options.get_session_config_entry("session.dynamic_block_base") == "4"
    with pytest.raises(RuntimeError):
        make_session(model, "none").get_session_options().get_session_config_entry("session.dynamic_block_base")
    ir.save(model, tmp_path / "m.onnx")
    feeds = {name: np.ones((1, 2, 128), np.float32) for name in ("x", "r")}
    assert benchmark([tmp_path / "m.onnx"], feeds, runs=1, warmup=0, min_round_ms=0.01).models[0].cpu_ms >= 0


def test_a_pass_that_is_taken_back_asks_for_nothing() -> None:
    model = parse(TEXT)
    run = PassManager([AsksAndBreaks()], verify="pass")(model)
    assert [r.status for r in run.records][:1] == ["rolled back"]
    assert SETTINGS_KEY not in model.metadata_props


def test_metadata_that_another_tool_wrote_wrongly(tmp_path: Path) -> None:
    model = parse(TEXT)
    model.metadata_props[SETTINGS_KEY] = "[1]"
    ir.save(model, tmp_path / "m.onnx")
    with pytest.raises(ModelError, match=r"m\.onnx.*JSON object"):
        graphopt.session(tmp_path / "m.onnx")
