"""Target profiles: the cost model, what is preferred, and the files."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from fake_profiles import fake
from hypothesis import given
from hypothesis import strategies as st

from graphopt.analysis import profile as profiles
from graphopt.analysis import profile_cache
from graphopt.analysis.choices import CHOICES
from graphopt.analysis.measure_profile import _run, _session, feeds, measure, micro_model
from graphopt.analysis.profile import Executed, Profile, preferred
from graphopt.errors import UsageError

ALL_ROWS = (1, 16, 128, 512)


def shapes(width: int) -> list[tuple[int, int]]:
    return [(rows, width) for rows in ALL_ROWS]


# ---- the cost model


def test_points_measured_come_back() -> None:
    profile = fake("residual-norm", lambda r, w, t: 1 + r / 1000 + w / 10_000 + t / 100)
    for rows in ALL_ROWS:
        for width in (128, 768, 3072):
            for threads in (1, 2):
                expected = 1 + rows / 1000 + width / 10_000 + threads / 100
                assert profile.ratio("residual-norm", "add", "sum", rows, width, threads) == pytest.approx(expected)
                inverse = profile.ratio("residual-norm", "sum", "add", rows, width, threads)
                assert inverse == pytest.approx(1 / expected)


def test_a_power_law_is_interpolated_exactly() -> None:
    profile = fake("residual-norm", lambda r, w, t: 2 * r**0.25 * w**-0.5)
    for rows, width in ((2, 128), (40, 300), (200, 1000), (512, 700)):
        found = profile.ratio("residual-norm", "add", "sum", rows, width, 1)
        assert found == pytest.approx(2 * rows**0.25 * width**-0.5)


@given(rows=st.integers(1, 100_000), width=st.integers(1, 100_000))
def test_the_model_stays_between_what_was_measured(rows: int, width: int) -> None:
    profile = fake("residual-norm", lambda r, w, t: 0.5 if r == 16 else 2.0)
    found = profile.compare("residual-norm", "add", "sum", rows, width, 1)
    assert found is not None
    assert 0.5 - 1e-9 <= found.cpu <= 2 + 1e-9


def test_beyond_the_points_the_doubt_grows() -> None:
    profile = fake("residual-norm", 0.9)
    inside = profile.compare("residual-norm", "add", "sum", 128, 768, 1)
    outside = profile.compare("residual-norm", "add", "sum", 128, 3072 * 8, 1)
    assert inside is not None
    assert outside is not None
    assert inside.cpu == pytest.approx(outside.cpu)
    assert inside.faster
    assert not outside.faster
    assert outside.cpu_noise == pytest.approx(inside.cpu_noise + 3 * profiles.DRIFT)


def test_nothing_is_said_of_what_was_not_measured() -> None:
    profile = fake("residual-norm", 0.5)
    assert profile.ratio("residual-norm", "add", "sum", 1, 128, 7) is None
    assert profile.ratio("siblings", "packed", "separate", 1, 128, 1) is None
    assert profile.prefers("siblings", shapes(128)) == CHOICES["siblings"].default


def test_alternatives_of_one_graph_are_the_same() -> None:
    same = {"gelu": {a: Executed(("BiasGelu",), "g") for a in ("add", "bias-gelu")}}
    profile = dataclasses.replace(fake("gelu", 0.5), executed=same, entries=())
    assert profile.ratio("gelu", "bias-gelu", "add", 3, 100, 1) == 1
    assert profile.prefers("gelu", shapes(128)) == "add"


# ---- what is preferred


def test_without_a_profile_the_default_of_the_installed_version(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ((1, 22), (1, 31), None):
        monkeypatch.setattr(profiles, "_installed", lambda version=version: version)
        for choice in CHOICES.values():
            assert choice.default_for(version) in choice.alternatives
            assert preferred(None, choice.name, 384) == choice.default_for(version)
    expected = {(1, 22): "add", (1, 29): "add", (1, 30): "sum", (2, 0): "sum", None: "add"}
    assert {v: CHOICES["residual-norm"].default_for(v) for v in expected} == expected


def test_a_profile_of_another_version_has_its_default() -> None:
    profile = dataclasses.replace(fake("residual-norm", 1.0), runtime="ONNX Runtime 1.22.1")
    assert profile.prefers("residual-norm", shapes(768)) == "add"
    assert dataclasses.replace(profile, runtime="unknown").prefers("residual-norm", shapes(768)) == "add"
    assert fake("residual-norm", 1.0).prefers("residual-norm", shapes(768)) == "sum"


def test_faster_everywhere_is_preferred() -> None:
    assert fake("residual-norm", 0.8).prefers("residual-norm", shapes(384)) == "add"
    assert preferred(fake("residual-norm", 0.8), "residual-norm", None) == "add"


@pytest.mark.parametrize(
    ("profile", "why"),
    [
        (fake("residual-norm", 1.2), "slower"),
        (fake("residual-norm", 0.96, noise=0.001), "within the margin"),
        (fake("residual-norm", lambda r, w, t: 1.3 if (r, t) == (16, 2) else 0.5), "slower at one point"),
        (fake("residual-norm", 0.8, noise=0.3), "noise"),
        (fake("residual-norm", 0.8, control=1.8), "a control that is off"),
    ],
)
def test_else_the_default_stays(profile: Profile, why: str) -> None:
    assert profile.prefers("residual-norm", shapes(768)) == "sum", why


def test_a_slip_within_the_noise_does_no_harm() -> None:
    profile = fake("residual-norm", lambda r, w, t: 1.01 if r == 1 else 0.7, noise=0.02)
    assert profile.prefers("residual-norm", shapes(768)) == "add"


def test_wall_time_can_forbid() -> None:
    profile = fake("residual-norm", 0.8)
    slow = tuple(
        dataclasses.replace(
            e, alternatives={a: dataclasses.replace(m, wall_ratio=m.cpu_ratio * 2) if a == "add" else m
                             for a, m in e.alternatives.items()}
        )
        for e in profile.entries
    )  # fmt: skip
    assert dataclasses.replace(profile, entries=slow).prefers("residual-norm", shapes(768)) == "sum"


def test_fixed_rows_count_alone() -> None:
    profile = fake("siblings", lambda r, w, t: 0.8 if r == 1 else 1.2)
    assert preferred(profile, "siblings", 768) == "separate"
    assert preferred(profile, "siblings", 768, 1) == "packed"


def test_the_best_of_several_is_taken() -> None:
    first = fake("attention", 0.9, alternative="spelled-out")
    second = fake("attention", 0.7, alternative="contrib-attention")
    both = tuple(
        dataclasses.replace(a, alternatives={**a.alternatives, **b.alternatives})
        for a, b in zip(first.entries, second.entries, strict=True)
    )
    assert dataclasses.replace(first, entries=both).prefers("attention", shapes(256)) == "contrib-attention"


# ---- files


def test_the_same_profile_gives_the_same_bytes(tmp_path: Path) -> None:
    profile = fake("residual-norm", lambda r, w, t: math.sqrt(r * w) / 999)
    profile.save(tmp_path / "deep" / "p.json")
    again = profiles.load(tmp_path / "deep" / "p.json")
    assert again == profile
    assert again.id == profile.id
    again.save(tmp_path / "q.json")
    assert (tmp_path / "q.json").read_bytes() == (tmp_path / "deep" / "p.json").read_bytes()
    assert [f.name for f in (tmp_path / "deep").iterdir()] == ["p.json"]
    assert "Some CPU" not in profile.description


def _broken(**changes: object) -> str:
    return json.dumps({**fake("residual-norm", 1.0).to_dict(), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '{"format": 1}', _broken(format=99), _broken(entries=[{}]), _broken(entries=3),
        _broken(threads="x"), _broken(executed={"gelu": 3}), _broken(cores=None), '"\\ud800"',
    ],
)  # fmt: skip
def test_a_file_that_is_no_profile_is_told_in_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UsageError, match=r"p\.json is no target profile") as caught:
        profiles.load(tmp_path / "p.json")
    assert "\n" not in str(caught.value)


def test_a_file_with_a_negative_time_is_refused(tmp_path: Path) -> None:
    data = fake("residual-norm", 1.0).to_dict()
    data["entries"][0]["control"]["cpu_ratio"] = -1
    (tmp_path / "p.json").write_text(json.dumps(data))
    with pytest.raises(UsageError, match="no target profile"):
        profiles.load(tmp_path / "p.json")


def test_no_file_binary_file_no_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        profiles.load(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="isn't text"):
        profiles.load(tmp_path / "b.json")
    with pytest.raises(UsageError, match="can't be written"):
        fake("residual-norm", 1.0).save(tmp_path / "b.json" / "p.json")


def test_the_cache(tmp_path: Path) -> None:
    assert profile_cache.cached(tmp_path) is None
    runtime, cpu, cores = profile_cache.this_machine()
    mine = dataclasses.replace(fake("residual-norm", 0.8), runtime=runtime, cpu=cpu, cores=cores)
    mine.save(profile_cache.cached_path(tmp_path))
    assert profile_cache.cached(tmp_path) == mine
    fake("residual-norm", 0.8).save(profile_cache.cached_path(tmp_path))
    with pytest.raises(UsageError, match="another machine"):
        profile_cache.cached(tmp_path)


# ---- what is measured


@pytest.mark.parametrize("name", list(CHOICES))
def test_alternatives_compute_the_same(name: str) -> None:
    choice = CHOICES[name]
    rows, width = (16, 64) if choice.layout == "image" else (6, 64)
    results = {
        alternative: _run(_session(micro_model(choice, alternative, width), 1), feeds(choice, rows, width))[0]
        for alternative in choice.alternatives
    }
    expected = results[choice.default]
    for alternative, result in results.items():
        error = np.abs(result - expected).max() / np.abs(expected).max()
        assert error < choice.tolerance, f"{alternative} is off by {error}"


def test_measuring() -> None:
    seen: list[tuple[str, int, int]] = []
    profile = measure(
        ["residual-norm", "gelu", "group-norm"],
        budget_seconds=0.2,
        rows=(16,),
        widths=(16,),
        threads=(1,),
        progress=lambda what, done, total: seen.append((what, done, total)),
    )
    assert {e.choice for e in profile.entries} == {"residual-norm", "gelu", "group-norm"}
    entry = next(e for e in profile.entries if e.choice == "residual-norm")
    assert all(list(e.alternatives) == ["add", "sum"] for e in profile.entries if e.choice == "gelu")
    assert list(entry.alternatives) == ["add", "sum"]
    assert entry.alternatives["add"].cpu_ratio == 1
    assert min(entry.control.cpu_us, entry.alternatives["sum"].wall_us) > 0
    assert "Sum" in profile.executed["residual-norm"]["sum"].operators
    assert seen[-1][1] == seen[-1][2]
    assert profiles.Profile.from_dict(json.loads(profile.dumps())) == profile


def test_an_unknown_choice() -> None:
    with pytest.raises(UsageError, match="no choice 'nothing'"):
        measure(["nothing"])
