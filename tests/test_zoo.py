"""The zoo's figures and page (benchmarks/zoo.py), without running a tool."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import tools
import zoo_page
from zoo_models import ENTRIES

from graphopt.models.catalogue import MODELS


def timing(**ratios: list[float]) -> dict[str, Any]:
    return {
        "workload": "",
        "original_ms": 2.0,
        "control": [0.99, 1.0],
        "ratios": ratios,
        "uncertainty": dict.fromkeys(ratios, 0.005),
    }


def tool(equal: bool = True, **more: Any) -> dict[str, Any]:
    return {
        "wall_s": 1.0,
        "peak_mb": 90.0,
        "nodes": 5,
        "bytes": 1e6,
        "loads": True,
        "equal": equal,
        "verdict": "",
        **more,
    }


def model(times: dict[str, Any], **found: dict[str, Any]) -> dict[str, Any]:
    return {"model": "m", "use": "", "original": {"nodes": 9, "bytes": 2e6}, "tools": found, "timings": [times]}


def test_noise_is_the_largest_of_what_is_known() -> None:
    assert zoo_page.noise(timing(a=[0.9, 0.9]), "a") == pytest.approx(0.01)
    assert zoo_page.noise(timing(a=[0.9, 1.0]), "a") == pytest.approx(0.05)
    assert zoo_page.noise(timing() | {"control": [1.04, 1.0]}) == pytest.approx(0.04)
    assert zoo_page.noise(timing(a=[1.0, 1.0]) | {"uncertainty": {"a": 0.03}}, "a") == pytest.approx(0.03)


def test_behind_the_best_peer_that_is_equal() -> None:
    times = timing(graphopt=[0.9, 0.9], wrong=[0.5, 0.5], peer=[0.8, 0.8], near=[0.895, 0.895])
    made = model(times, graphopt=tool(), wrong=tool(equal=False), peer=tool(), near=tool())
    assert zoo_page.behind(made, times) == "peer"
    made["tools"]["peer"]["equal"] = False
    assert zoo_page.behind(made, times) is None
    assert not zoo_page.slower(times)
    assert zoo_page.slower(timing(graphopt=[1.05, 1.05]))


def test_the_page_names_what_fails() -> None:
    times = timing(graphopt=[0.9, 0.9], differs=[0.7, 0.7])
    made = model(
        times,
        graphopt=tool(),
        differs=tool(equal=False, verdict="Output 'y' is off"),
        fails={"error": "x <y> /a/b/c.py"},
    )
    environment = {"date": "2026-01-01", "onnxruntime": "1", "python": "3", "processor": "p", "threads": 1}
    versions = {"graphopt": "1", "differs": "2", "fails": None}
    text = zoo_page.page({"environment": environment, "versions": versions, "models": [made]})
    assert "graphopt: equal 1 of 1." in text
    assert "| m | 2 | 0.010 | **0.90** | 0.70 ≠ | – |  |" in text
    assert "- m, differs: Output 'y' is off" in text
    assert "- m, fails: x &lt;y> c.py" in text


def test_every_onnx_model_and_four_exports() -> None:
    keys = [key for key in ENTRIES if not key.startswith(("minilm-", "smollm2"))]
    assert keys == [key for key, found in MODELS.items() if found.kind == "onnx"]
    assert len(ENTRIES) - len(keys) == 4 + 1


def test_a_process_is_measured_and_stopped(tmp_path: Path) -> None:
    large = tools.measure([sys.executable, "-c", "x = b'x' * 200_000_000"], tmp_path / "log")
    small = tools.measure([sys.executable, "-c", "pass"], tmp_path / "log")
    assert large.status == small.status == 0
    assert large.peak_mb - small.peak_mb > 100
    assert small.peak_mb < 60  # what this process holds doesn't count
    failed = tools.measure([sys.executable, "-c", "raise SystemExit('no way')"], tmp_path / "log")
    assert (failed.status, failed.error) == (1, "no way")
    late = tools.measure([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", timeout_s=0.3)
    assert late.status < 0
    assert late.error == "stopped after 0 s"


def test_a_peer_that_is_not_installed_has_no_version() -> None:
    assert tools.Tool("x", "no-such-distribution", ("-c", "")).version is None
    assert tools.graphopt_tool().version is not None
