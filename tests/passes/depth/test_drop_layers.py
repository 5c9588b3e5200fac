"""drop-layers: which branches go, by each score and search."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from calibration.small_models import parse
from tiny_decoders import decoder
from zeroed import outputs, units_of

from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import BatchedDataset
from graphopt.errors import UsageError
from graphopt.pass_manager import PassManager
from graphopt.passes.depth.closeness import Span, closeness
from graphopt.passes.depth.drop_layers import DropLayers
from graphopt.passes.depth.gates import gated
from graphopt.passes.depth.positions import by_position
from graphopt.verification.trial_workers import Workers
from graphopt.verification.trials import Trials

LAYERS = 6


def stream(scales: list[float], seed: int = 0) -> ir.Model:
    """Layers x + s · tanh(x·A)·B in a row."""
    from calibration.small_models import residual

    model = residual(len(scales), seed=seed)
    for i, scale in enumerate(scales):
        held = model.graph.initializers[f"b{i}"]
        assert held.const_value is not None
        held.const_value = ir.tensor(held.const_value.numpy() * np.float32(scale), name=held.name)
    return model


def data(samples: int = 3) -> Calibration:
    rng = np.random.default_rng(1)
    return Calibration(BatchedDataset({"x": rng.normal(size=(samples, 5, 8)).astype(np.float32)}, batch=1), threads=1)


def run(model: ir.Model, **options: Any) -> DropLayers:
    step = DropLayers(**{"granularity": "joint", "samples": 3, **options})
    step.calibration = data()
    step(model)
    return step


def losses(model: ir.Model) -> dict[tuple[int, ...], float]:
    """What the model loses without each set of branches of up to three."""
    units = units_of(model).units
    made = gated(model, units)
    trials = Trials(made.model, list(made.gates.values()), data().feeds(model), threads=1)
    return {
        chosen: trials.loss(made.closed(units[i] for i in chosen))
        for size in (1, 2, 3)
        for chosen in itertools.combinations(range(len(units)), size)
    }


def names(chosen: tuple[int, ...]) -> list[str]:
    return [f"mlp.{i}" for i in chosen]


@pytest.mark.parametrize("score", ["loss", "influence", "contribution"])
def test_what_adds_least_goes_first(score: str) -> None:
    model = stream([1, 0.03, 1, 1, 0.01, 1])
    step = run(model, count=2, score=score)
    assert step.branches == ["mlp.1", "mlp.4"]
    assert len(units_of(model).units) == 4
    assert len(step.scores) == LAYERS
    assert (step.option_values().get("expected_divergence") is not None) == (score == "loss")


def test_a_run_of_layers_goes_by_its_angle() -> None:
    model = stream([1, 0.3, 0.3, 1, 0.05, 1])
    step = run(model, count=2, score="angular", granularity="block")
    assert step.branches == ["mlp.1", "mlp.2"]


def test_a_run_lies_on_one_stream() -> None:
    """Two streams of other widths, two layers each."""
    rng, weights = np.random.default_rng(0), {}
    lines = ["x0 = Identity(x)"]
    for i, width in enumerate((8, 8, 12, 12)):
        if i == 2:
            weights["wider"] = rng.normal(size=(8, 12)).astype(np.float32)
            lines.append("z2 = MatMul(x2, wider)")
        inner, (before, after) = 2 * width, (f"{'x' if width == 8 else 'z'}{n}" for n in (i, i + 1))
        weights[f"a{i}"] = (rng.normal(size=(width, inner)) / width**0.5).astype(np.float32)
        weights[f"b{i}"] = (rng.normal(size=(inner, width)) * (0.1 + 0.1 * (i == 1))).astype(np.float32)
        lines += [f"u{i} = MatMul({before}, a{i})", f"t{i} = Tanh(u{i})", f"d{i} = MatMul(t{i}, b{i})"]
        lines.append(f"{after} = Add({before}, d{i})")
    text = "\n".join([*lines, "y = Identity(z4)"])
    model = parse(f"g (float[b, t, 8] x) => (float[b, t, 12] y) {{\n{text}\n}}", weights)
    units = {unit.name: unit.stream for unit in units_of(model).units}
    assert len(units) == 4
    assert len(set(units.values())) == 2
    step = run(model.clone(), count=2, score="angular", granularity="block")
    assert len({units[name] for name in step.branches}) == 1
    with pytest.raises(UsageError, match="there is no run of 3 neighbours"):
        run(model, count=3, score="angular", granularity="block")


def test_a_search_spares_the_last_cache() -> None:
    ids = np.array([[4, 9, 2, 30, 11, 7]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for i in range(3):
        feeds |= {f"past_key_values.{i}.{part}": np.zeros((1, 2, 0, 16), np.float32) for part in ("key", "value")}
    given = Calibration(BatchedDataset(feeds, batch=1), threads=1)
    most = DropLayers(granularity="attention", samples=1, search="knapsack", fraction=0.8)
    most.calibration = given
    most(ir.from_proto(decoder("concat", layers=3)))
    assert "attention.2" not in most.branches
    for options in ({"score": "last"}, {"search": "greedy"}, {}):
        step = DropLayers(granularity="attention", samples=1, count=3, **options)
        step.calibration = given
        with pytest.raises(UsageError, match="3 can't go, since there are 2"):
            step(ir.from_proto(decoder("concat", layers=3)))
        assert step.sites[-1].detail == "attention.2 isn't removed: its cache tells how many tokens came before"


@pytest.mark.parametrize("search", ["one-shot", "greedy"])
def test_by_perplexity(search: str) -> None:
    ids = np.random.default_rng(2).integers(0, 40, (4, 12))
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    for i in range(3):
        feeds |= {f"past_key_values.{i}.{part}": np.zeros((4, 2, 0, 16), np.float32) for part in ("key", "value")}
    given = Calibration(BatchedDataset(feeds, batch=1), threads=1)
    model = ir.from_proto(decoder("concat", layers=3))
    units = units_of(model).units
    made = gated(model, units)
    trials = Trials(made.model, list(made.gates.values()), given.feeds(model), threads=1, judge="perplexity")
    known = {unit.name: trials.loss(made.closed([unit])) for unit in units}
    step = DropLayers(granularity="joint", samples=4, count=1, score="perplexity", search=search)
    step.calibration = given
    step(model)
    assert step.scores == pytest.approx(known)
    assert step.branches == [min(known, key=lambda name: known[name])]
    told = step.option_values()
    assert "expected_divergence" not in told
    assert told["expected_log_perplexity_increase"] == min(step.scores.values())
    if search == "greedy":
        assert told["path"] == [{"branches": step.branches, "log_perplexity_increase": min(step.scores.values())}]


def test_one_shot_takes_the_lowest_losses() -> None:
    model = stream([1.0] * LAYERS, seed=3)
    known = losses(model)
    best = sorted(range(LAYERS), key=lambda i: known[i,])[:3]
    assert run(model, count=3).branches == names(tuple(sorted(best)))


def test_greedy_takes_one_after_the_other_and_a_wide_beam_all() -> None:
    model = stream([1.0] * LAYERS, seed=5)
    known = losses(model)
    step = run(model.clone(), count=3, search="greedy", beam=64)
    best = min((c for c in known if len(c) == 3), key=known.__getitem__)
    assert step.branches == names(best)
    assert step.expected == pytest.approx(known[best])
    narrow = run(model.clone(), count=3, search="greedy")
    one = min((c for c in known if len(c) == 1), key=known.__getitem__)
    two = min((c for c in known if len(c) == 2 and set(one) < set(c)), key=known.__getitem__)
    three = min((c for c in known if len(c) == 3 and set(two) < set(c)), key=known.__getitem__)
    assert narrow.branches == names(three)


def test_evolution_is_no_worse_than_where_it_starts() -> None:
    model = stream([1.0] * LAYERS, seed=7)
    start = run(model.clone(), count=3)
    found = run(model.clone(), count=3, search="evolutionary", generations=12)
    assert found.branches is not None
    assert len(found.branches) == 3
    assert start.expected is not None
    assert found.expected is not None
    assert found.expected <= start.expected
    assert run(model.clone(), count=3, search="evolutionary", generations=12).branches == found.branches


def test_two_processes_choose_what_one_does_and_end_with_the_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Seen(Workers):
        def __init__(self, *given: Any) -> None:
            super().__init__(*given)
            started.extend(worker._process for worker in self._workers)

    monkeypatch.setattr("graphopt.verification.trials.Workers", Seen)
    model = stream([1.0] * LAYERS, seed=7)
    for options in ({"search": "evolutionary", "generations": 3}, {"search": "greedy", "beam": 2}):
        found = []
        for jobs in (1, 2):
            step = DropLayers(granularity="joint", samples=3, count=2, **options)  # type: ignore[arg-type]
            step.calibration = dataclasses.replace(data(), threads=jobs, jobs=jobs)
            step(model.clone())
            found.append(step.option_values())
        assert found[0] == found[1]
    assert [process.poll() is None for process in started] == [False, False]


def test_a_knapsack_removes_enough_bytes() -> None:
    model = stream([1.0] * LAYERS, seed=2)
    units = units_of(model).units
    step = run(model, fraction=0.4, search="knapsack")
    gone = sum(unit.bytes for unit in units if unit.name in (step.branches or ()))
    assert gone >= 0.4 * sum(unit.bytes for unit in units)
    assert len(step.branches or ()) == 3


def test_a_search_sees_many_samples_where_each_is_judged_once() -> None:
    step = DropLayers(count=1, granularity="joint")
    step.calibration = data(5)
    step(stream([1, 0.02, 1]))
    assert step.option_values()["samples"] == 32
    given = DropLayers(count=1, granularity="joint", samples=1)
    given.calibration = data(5)
    given(stream([1, 0.02, 1]))
    assert given.option_values()["samples"] == 1


def test_what_was_found_can_be_given_without_data() -> None:
    model = stream([1.0] * LAYERS, seed=4)
    other = model.clone()
    step = run(model, count=2)
    found = step.option_values()
    again = DropLayers(branches=found["branches"])
    assert again.needs == ()
    assert again(other).modified
    given = {"x": np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32)}
    np.testing.assert_array_equal(outputs(model, given)["y"], outputs(other, given)["y"])


def test_a_recipe_runs_it_with_data_and_reports_it() -> None:
    model = stream([1, 0.02, 1])
    told: list[tuple[str, int, int]] = []
    calibration = Calibration(data().data, threads=1, progress=lambda *a: told.append(a))
    report = PassManager([DropLayers(count=1, granularity="mlp")], calibration=calibration, verify="none")(model)
    assert [site.detail for site in report.records[0].sites] == ["mlp.1 removed: 768 bytes of weights"]
    assert told == [("trying each branch", i, 3) for i in range(3)]


def test_some_are_kept() -> None:
    model = stream([0.001, 1, 1, 1, 1, 0.001])
    assert set(run(model, count=2, keep=1).branches or ()) <= {f"mlp.{i}" for i in range(1, 5)}
    with pytest.raises(UsageError, match="5 can't go, since there are 4"):
        run(stream([1.0] * LAYERS), count=5, keep=1, score="last")


def test_open_gates_change_nothing() -> None:
    model = stream([1.0] * 3)
    units = units_of(model).units
    made = gated(model, units)
    given = {"x": np.random.default_rng(0).normal(size=(2, 4, 8)).astype(np.float32)}
    np.testing.assert_array_equal(outputs(model, given)["y"], outputs(made.model, given)["y"])
    made.gates["mlp.1"].const_value = ir.tensor(np.asarray(False))
    DropLayers(branches=["mlp.1"])(model)
    np.testing.assert_array_equal(outputs(model, given)["y"], outputs(made.model, given)["y"])


def test_padded_tokens_dont_count() -> None:
    model = ir.from_proto(decoder("concat"))
    units = units_of(model).units
    ids = np.array([[4, 9, 2, 30, 11, 7]])
    cache = {
        f"past_key_values.{i}.{part}": np.zeros((1, 2, 0, 16), np.float32)
        for i in range(2)
        for part in ("key", "value")
    }

    def measured(length: int, padding: int) -> list[float]:
        feeds = {
            "input_ids": np.concatenate([ids[:, :length], np.zeros((1, padding), np.int64)], axis=1),
            "attention_mask": np.array([[1] * length + [0] * padding]),
            **cache,
        }
        given = Calibration(BatchedDataset(feeds, batch=1), threads=1)
        return [c.cosine for c in closeness(model, [Span(u, u) for u in units], given, 1)]

    assert measured(4, 2) == pytest.approx(measured(4, 0), abs=1e-6)
    assert measured(4, 2) != pytest.approx(measured(6, 0), abs=1e-6)


@pytest.mark.parametrize(
    ("position", "expected"),
    [
        ("last", [6, 7]), ("first", [0, 1]), ("symmetric", [3, 4]), ("alternate", [4, 6]), ("uniform", [2, 5]),
    ],
)  # fmt: skip
def test_positions(position: Any, expected: list[int]) -> None:
    assert by_position(position, 8, 2) == expected
    for size in range(1, 9):
        for count in range(size + 1):
            chosen = by_position(position, size, count)
            assert chosen == sorted(set(chosen))
            assert len(chosen) == count
            assert all(0 <= place < size for place in chosen)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "cosine"}, "score is one of"),
        ({"count": 1, "fraction": 0.5}, "give one of them"),
        ({"fraction": 1}, "from 0 to below 1"),
        ({"count": -1}, "must not be negative"),
        ({"search": "greedy", "score": "influence"}, "goes by loss or perplexity"),
        ({"score": "angular"}, "granularity: block"),
        ({"samples": 0}, "must be at least 1"),
    ],
)
def test_wrong_options_are_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DropLayers(**options)


def test_a_branch_that_isnt_there() -> None:
    with pytest.raises(UsageError, match=r"no branch 'attention\.9'"):
        DropLayers(branches=["attention.9"])(stream([1.0] * 2))
