"""allocate-bits: what is sensitive gets the bits, and the budget holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from exactness import parse_weighted

from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset
from graphopt.errors import UsageError
from graphopt.graph.edits import nodes
from graphopt.pass_manager import PassManager
from graphopt.passes.quantize.allocate_bits import AllocateBits
from graphopt.passes.quantize.product_times import Product
from graphopt.passes.quantize.quantize_weights import QuantizeWeights
from graphopt.runtime_ops.memory_session import make_session
from graphopt.verification.quality.generic import relative_error
from graphopt.verification.trials import Trials

HEAD = '<ir_version: 10, opset_import: ["": 21]>\n'
TWO = (
    HEAD
    + """g (float[batch, seq, 64] x) => (float[batch, seq, 64] y)
<float[64, 64] loud, float[64, 64] quiet, float tiny> {
  a = MatMul(x, loud)
  b = Sigmoid(x)
  c = MatMul(b, quiet)
  d = Mul(c, tiny)
  s = Add(a, d)
  y = Abs(s)
}"""
)
"""Of `quiet` the output has a hundredth."""
DATA_SEED = 3


def two() -> ir.Model:
    model = parse_weighted(TWO)
    value = model.graph.initializers["tiny"]
    value.const_value = ir.tensor(np.array(0.01, np.float32), name="tiny")
    return model


def data(count: int = 4, seed: int = DATA_SEED) -> ArrayDataset:
    rng = np.random.default_rng(seed)
    return ArrayDataset([{"x": rng.standard_normal((2, 24, 64)).astype(np.float32)} for _ in range(count)])


def run_pass(**options: Any) -> tuple[ir.Model, AllocateBits]:
    model = two()
    pass_ = AllocateBits(rounding="nearest", tokens="all", **options)
    PassManager([pass_], calibration=data(), verify="none")(model)
    return model, pass_


SECONDS = {None: 8e-3, 2: 1e-3, 4: 3e-3, 8: 4e-3}
"""Of a product with weights of so many bits; None: float ones."""


def fake_times(monkeypatch: pytest.MonkeyPatch) -> list[Product]:
    """Let products take `SECONDS`; what is asked for is in the list."""
    asked: list[Product] = []

    def seconds(products: dict[Product, int], threads: int | None, cache: Path | None) -> dict[Product, float]:
        asked.extend(products)
        return {one: SECONDS[None if one.setting is None else one.setting.bits] for one in products}

    monkeypatch.setattr("graphopt.passes.quantize.latency.product_seconds", seconds)
    return asked


CANDIDATES = [{"bits": 2, "group_size": 32}, {"bits": 4, "group_size": 32}, {"bits": 8, "group_size": 32}]


def test_what_counts_most_gets_the_bits() -> None:
    _, pass_ = run_pass(candidates=CANDIDATES, budget=6.0)
    bits = {name: options["bits"] for name, options in pass_.sites_chosen.items()}
    assert bits == {"loud": 8, "quiet": 2}
    assert pass_.expected is not None
    assert pass_.expected > 0


@pytest.mark.parametrize("budget", [3.0, 5.0, 9.0, "4kB"])
def test_the_budget_holds(budget: float | str) -> None:
    model, _ = run_pass(candidates=CANDIDATES, budget=budget)
    stored = sum(
        value.const_value.nbytes
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.name != "tiny" and value.uses()
    )
    allowed = 4000 if isinstance(budget, str) else budget * 2 * 64 * 64 / 8
    assert stored <= allowed


def test_a_divergence_that_no_candidate_keeps_is_told() -> None:
    with pytest.raises(
        UsageError, match=r"'kl=0.000000001' can't be kept: the largest candidates are expected to lose"
    ):
        run_pass(candidates=CANDIDATES, budget="kl=0.000000001")


@pytest.mark.parametrize("budget", [2.2, "1kB", "1kB, latency=0.9"])
def test_a_budget_that_cannot_be_kept_is_told_before_the_trials(
    budget: float | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trials, "losses", None)
    with pytest.raises(UsageError, match=r"can't be kept: the smallest candidates take 0.002688 MB, 2.625 bits"):
        run_pass(candidates=CANDIDATES, budget=budget)


def test_more_budget_expects_less_loss_and_a_divergence_is_kept() -> None:
    losses = []
    for budget in (2.75, 4.75, 6.75, 9.0):
        found = run_pass(candidates=CANDIDATES, budget=budget)[1].expected
        assert found is not None
        losses.append(found)
    assert losses == sorted(losses, reverse=True)
    wanted = losses[1]
    kept = run_pass(candidates=CANDIDATES, budget=f"kl={wanted:.9f}1")[1].expected
    assert kept is not None
    assert kept <= wanted * 1.0001


def test_the_allocation_loses_less_than_its_opposite_in_as_many_bytes() -> None:
    feeds = next(iter(data(1).feeds(two())))
    expected = make_session(two()).run(None, feeds)[0]

    def error(model: ir.Model) -> float:
        return relative_error(expected, make_session(model).run(None, feeds)[0])

    found, pass_ = run_pass(candidates=CANDIDATES, budget=6.1)
    opposite = two()
    names = list(pass_.sites_chosen)
    turned = dict(zip(names, reversed(list(pass_.sites_chosen.values())), strict=True))
    PassManager([QuantizeWeights(symmetric=False, sites=turned)], verify="none")(opposite)
    assert error(found) < error(opposite) / 2


def test_the_report_lists_what_was_chosen() -> None:
    model = two()
    report = PassManager([AllocateBits(rounding="nearest", tokens="all")], calibration=data(), verify="none")(model)
    options = report.records[0].options
    assert set(options["sites"]) == {"loud", "quiet"}
    assert options["expected_divergence"] >= 0
    assert any(node.domain for node in nodes(model))
    bytes_, losses = zip(*options["frontier"][:-1], strict=True)
    assert list(bytes_) == sorted(bytes_)
    assert list(losses) == sorted(losses, reverse=True)
    assert options["frontier"][-1][1] == pytest.approx(options["expected_divergence"])


@pytest.mark.parametrize(
    "budget",
    [0, -1, "80", "kl=x", 40, True, "latency=", "latency=0", "latency=2", "latency=5h", "80MB, kl=0.1", "1kB, 2kB",
     "latency=1ms, latency=0.5"],
)  # fmt: skip
def test_budgets_of_no_known_form_are_refused(budget: Any) -> None:
    with pytest.raises(ValueError, match="budget is bits per weight"):
        AllocateBits(budget=budget)


def test_trials_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[list[str]] = []
    loss = Trials.loss

    def counted(trials: Trials, changed: Any, samples: int | None = None) -> float:
        if len(tried) == 1 and budget == "interrupted":
            raise KeyboardInterrupt
        tried.append(list(changed))
        return loss(trials, changed, samples)

    monkeypatch.setattr(Trials, "loss", counted)

    def allocated(budget: float | str, seed: int = DATA_SEED) -> AllocateBits:
        pass_ = AllocateBits(rounding="nearest", tokens="all", candidates=CANDIDATES, budget=budget)
        PassManager([pass_], calibration=Calibration(data(seed=seed), cache=tmp_path), verify="none")(two())
        return pass_

    budget = "interrupted"
    with pytest.raises(KeyboardInterrupt):
        allocated(6.0)
    budget = ""
    first = allocated(6.0)
    assert sorted(tried) == [["loud"], ["quiet"]]
    assert allocated(4.0).sites_chosen != first.sites_chosen
    assert allocated(6.0).option_values() == first.option_values()
    assert len(tried) == 2
    allocated(6.0, seed=DATA_SEED + 1)
    assert len(tried) == 4


def test_two_processes_allocate_what_one_does() -> None:
    found = []
    for jobs in (1, 2):
        pass_ = AllocateBits(rounding="nearest", tokens="all", candidates=CANDIDATES, budget=6.0)
        PassManager([pass_], calibration=Calibration(data(), threads=jobs, jobs=jobs), verify="none")(two())
        found.append((pass_.sites_chosen, pass_.expected))
    assert found[0] == found[1]


def test_candidates_of_other_grids() -> None:
    vectors = {"grid": "higgs", "bits": 2, "rounding": "gptq"}
    model, pass_ = run_pass(candidates=[vectors, {"bits": 8, "group_size": 32}], budget=6.2)
    assert pass_.sites_chosen["quiet"] == vectors
    assert pass_.sites_chosen["loud"]["bits"] == 8
    assert {node.op_type for node in nodes(model)} >= {"CodebookMatMul", "MatMulNBits"}
    with pytest.raises(ValueError, match="higgs"):
        AllocateBits(candidates=[{**vectors, "rounding": "comq"}])


@pytest.mark.parametrize(
    ("budget", "bits", "part"),
    [
        ("latency=0.45", (8, 4), 7 / 16),
        ("latency=0.4", (8, 2), 5 / 16),
        ("latency=4.5ms", (4, 2), 4 / 16),
        ("latency=8ms", (8, 8), 8 / 16),
        ("9.3, latency=0.5", (8, 8), 8 / 16),
        ("7, latency=0.5", (8, 4), 7 / 16),
        ("9, latency=0.3", (4, 2), 4 / 16),
    ],
)
def test_a_latency_is_kept(monkeypatch: pytest.MonkeyPatch, budget: str, bits: tuple[int, int], part: float) -> None:
    asked = fake_times(monkeypatch)
    _, pass_ = run_pass(candidates=CANDIDATES, budget=budget)
    assert tuple(pass_.sites_chosen[name]["bits"] for name in ("loud", "quiet")) == bits
    assert {one.shape for one in asked} == {(64, 64)}
    found = pass_.option_values()["latency"]
    assert (found["part"], found["float_ms"]) == (round(part, 4), 16.0)
    assert found["predicted_ms"] == pytest.approx(part * 16)
    assert "kinds of products" in found["measured"]


def test_a_latency_that_no_candidate_keeps_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_times(monkeypatch)

    def told(budget: str, candidates: list[dict[str, int]]) -> str:
        pass_ = AllocateBits(rounding="nearest", tokens="all", budget=budget, candidates=candidates)
        with pytest.raises(UsageError) as caught:
            PassManager([pass_], calibration=data(), verify="none")(two())
        return str(caught.value)

    said = told("latency=0.1", CANDIDATES)
    assert "'latency=0.1' can't be kept: the fastest candidates' products take 2 ms for a token here, 12% of" in said
