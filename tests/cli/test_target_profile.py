"""`graphopt target` and `--profile` from the outside."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from fake_profiles import fake

from graphopt.analysis import measure_profile, profile_cache
from graphopt.analysis import profile as profiles
from tests.cli.conftest import Run

pytest.importorskip("onnxruntime", reason="ONNX Runtime isn't installed")
NUMBERS = ", ".join(["0.5"] * 128)
TEXT = f"""<ir_version: 10, opset_import: ["": 21]>
g (float[b, s, 128] x, float[b, s, 128] r) => (float[b, s, 128] y)
<float[128] w = {{{NUMBERS}}}, float[128] c = {{{NUMBERS}}}> {{
  a = Add(x, r)
  y = LayerNormalization<axis = -1>(a, w, c)
}}"""


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Profiles are kept apart from those of whoever runs the tests."""
    monkeypatch.setenv("GRAPHOPT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring at one shape of two choices."""
    real = measure_profile.measure

    def small(**given: object) -> profiles.Profile:
        return real(
            ["residual-norm", "swish"], rows=(2,), widths=(16,), threads=(1,), **{**given, "budget_seconds": 0.05}
        )

    monkeypatch.setattr(measure_profile, "measure", small)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def test_without_a_profile_it_says_how_to_make_one(run: Run) -> None:
    code, out, _ = run("target")
    assert code == 0
    assert "graphopt target --measure" in out
    assert json.loads(run("target", "--json")[1])["profile"] is None


def test_measuring_keeps_the_profile(run: Run, quick: None) -> None:
    code, out, err = run("target", "--measure", "--quick")
    assert code == 0, err
    assert "residual-norm" in out
    assert "SkipLayerNormalization" in out
    assert "the same graph" in out
    assert profile_cache.cached_path().exists()
    data = json.loads(run("target", "--json")[1])["profile"]
    assert data["id"] == profiles.load(profile_cache.cached_path()).id
    assert data["entries"]
    assert run("target")[1].count("residual-norm") == out.count("residual-norm")


def test_measuring_to_a_file(run: Run, quick: None, tmp_path: Path) -> None:
    code, out, _ = run("target", "--measure", "-o", tmp_path / "deep" / "p.json", "--json")
    assert code == 0
    assert not profile_cache.cached_path().exists()
    assert profiles.load(tmp_path / "deep" / "p.json").id == json.loads(out)["profile"]["id"]
    assert run("target", "--profile", tmp_path / "deep" / "p.json")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--quick",), "--measure"),
        (("-o", "p.json"), "--measure"),
        (("--measure", "--profile", "p.json"), "not both"),
        (("cuda", "--measure"), "target cpu"),
        (("--profile", "none.json"), "can't be read"),
    ],
)
def test_wrong_use(run: Run, arguments: tuple[str, ...], word: str) -> None:
    code, out, err = run("target", *arguments)
    assert code == 2
    assert word in err
    assert "Traceback" not in out + err


def test_a_broken_cache_is_one_sentence(run: Run, model: Path) -> None:
    place = profile_cache.cached_path()
    place.parent.mkdir(parents=True)
    place.write_text("{")
    for arguments in (("target",), ("optimize", model)):
        code, _, err = run(*arguments)
        assert code == 2
        assert "no target profile" in err
        assert err.count("\n") == 1
    assert run("optimize", model, "--profile", "none")[0] == 0


def test_optimize_by_a_profile(run: Run, model: Path, tmp_path: Path) -> None:
    fake("residual-norm", 0.8).save(tmp_path / "p.json")
    code, out, err = run("optimize", model, "--recipe", "exact", "--profile", tmp_path / "p.json", "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["profile"]["id"] == profiles.load(tmp_path / "p.json").id
    assert data["operators"].get("Sum") is None
    assert data["arguments"][-2:] == ["--profile", str(tmp_path / "p.json")]
    code, out, _ = run("optimize", model, "--force")
    assert "safe defaults" in out
    code, _, err = run("optimize", model, "--force", "--target", "portable", "--profile", tmp_path / "p.json")
    assert code == 2
    assert "target cpu" in err


def test_optimize_by_the_cached_profile(run: Run, quick: None, model: Path) -> None:
    run("target", "--measure")
    data = json.loads(run("optimize", model, "--json")[1])
    assert data["profile"]["id"] == profiles.load(profile_cache.cached_path()).id
    assert data["arguments"][-2:] == ["--profile", str(profile_cache.cached_path())]
    data = json.loads(run("optimize", model, "--force", "--profile", "none", "--json")[1])
    assert data["profile"] == "defaults"
    assert data["arguments"][-2:] == ["--profile", "none"]
