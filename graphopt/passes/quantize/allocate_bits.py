"""allocate-bits: each weight the bits and groups that lose least under a budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.attention_sites import AttentionSite, attention_sites
from graphopt.analysis.linear_sites import LinearSite
from graphopt.analysis.profile_cache import this_machine
from graphopt.analysis.shapes import infer
from graphopt.calibration.cache import TrialCache
from graphopt.errors import UsageError
from graphopt.passes.base import Guarantee, SearchPass
from graphopt.passes.quantize.bit_budget import parsed
from graphopt.passes.quantize.latency import ROWS, Latency, latency
from graphopt.passes.quantize.packing import packed_bytes
from graphopt.passes.quantize.product_times import nearest
from graphopt.passes.quantize.quantize_weights import TABLES, QuantizeWeights
from graphopt.passes.quantize.rounding_gains import rounding_gains
from graphopt.passes.quantize.setting import Setting
from graphopt.passes.quantize.site_weights import as_stored, table_group, weight_rows
from graphopt.passes.quantize.token_weights import TokensOf
from graphopt.search.allocation import Allocation, Choice, Item, allocate, allocate_both, frontier
from graphopt.verification.trial_loss import MEANING
from graphopt.verification.trials import Trials

CANDIDATES: tuple[dict[str, Any], ...] = (
    {"bits": 2, "group_size": 32},
    {"bits": 3, "group_size": 128},
    {"bits": 4, "group_size": 128},
    {"bits": 4, "group_size": 32},
    {"bits": 8, "group_size": 64},
)
"""What a weight may get: widths and groups that the operators run fast, from the smallest to what loses nothing."""
PROBE = {"bits": 4, "group_size": 128}
"""What each weight is rounded to for its sensitivity."""
SHOWN = 16
"""Allocations of which the report tells bytes and loss."""
_TABLE_BITS = (4, 8)
"""Of what is looked up by rows."""
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class _Measured:
    """A choice for some weights.

    Attributes:
        name: Of the choice.
        size: Bytes.
        squared: The squared error of each weight by name, rounded to nearest.
        calibrated: Whether they will be rounded by data.
    """

    name: str
    size: float
    squared: dict[str, float]
    calibrated: bool

    def choice(self, per_error: float, gains: Mapping[str, float]) -> Choice:
        """With the loss that is to be expected."""
        left = gains if self.calibrated else {}
        return Choice(self.name, self.size, per_error * sum(e * left.get(w, 1.0) for w, e in self.squared.items()))


class AllocateBits(SearchPass):
    """Quantize weights, each with the bits and groups that together lose least under a budget.

        minimise Σ_l α_l · e_l(c_l)   with   Σ_l bytes_l(c_l) ≤ budget   (or seconds)
        e_l(c) = |W_l − Q_c(W_l)|² / |W_l|²,   α_l = D_l(p) / e_l(p)

    For small errors the loss of a model is a sum over its weights, each in proportion to the weight's relative squared
    error. So one trial a weight is enough: D_l(p) is the divergence of the model's outputs from the original's where
    this weight alone is rounded to nearest (in 4 bits, groups of 128). What was chosen is among the options that the
    report lists, as `sites` of `quantize-weights`.

    Papers: Pushing the Limits of Large Language Model Quantization via the Linearity Theorem (sensitivity, and the
    allocation by dynamic programming). There α is measured with Gaussian noise added to a weight; here with an error
    of rounding, whose directions are those of the errors to come. One choice a weight under one budget is an integer
    program, the multiple-choice knapsack; dynamic programming solves it, with costs in parts of 1/8192 of the budget.

    1. Weights that read one value (queries, keys and values) get one choice, since they are written as one.
    2. A trial exchanges weights within one session, on the first `samples` of the data; no model is written for it.
    3. Errors are those of rounding to nearest, from some rows of a weight. Where the rounding that follows looks at
       data, what it leaves of them counts: tr(E H Eᵀ) of both on 64 rows of the weight, H being the second moments of
       its inputs. Tables are rounded to nearest, and their errors count whole.
    4. What a trial gave is kept in the cache of calibration as soon as it is made. It doesn't hang on the budget or the
       candidates, so that another budget, or a run that was interrupted, takes up what is there.
    5. A budget of latency counts the time of the products of one token, on the machine at hand: Σ_l t_l(c_l) in place
       of bytes. Each distinct shape with each candidate, and with a float weight, is timed in ONNX Runtime, all in
       turn; products stand in chains of several, with weights of their own, and between two runs of a chain all others
       run, so that weights come from where they come from in the model, and not always from the cache. What a product
       makes of its inputs counts too (rule 6 of `quantize-weights`). The rest of a token (attention, normalizations)
       isn't counted, nor are branches of low rank. The times are kept in the cache of calibration; the report has the
       time that was predicted, and that of float products. With bytes and latency both are kept, by a price on time
       (Lagrangian relaxation).
    6. Then `quantize-weights` runs with what was chosen.

    **Options:** `budget` (default 4.25): bits per weight, all weights together; or bytes of the weights, as "80MB"; or
    a divergence that may be expected, as "kl=0.1": the fewest bytes that keep below it; or a latency, as "latency=0.5",
    half of the time of the float products, or "latency=12ms", their time at one token, by rule 5; or bits or bytes with
    a latency, as "80MB, latency=0.5"; `candidates` (default: 2 bits
    in groups of 32, 3 in 128, 4 in 128 and 32, 8 in 64): options of `quantize-weights` that a weight may get, of other
    grids too, such as {grid: higgs, bits: 2} (what is looked up by rows gets integers in 4 or 8 bits); `samples`
    (default 2): of the data, for the trials; `symmetric` (default false): as of `quantize-weights`; `rounding` (default
    "gptq"): as of it; `tokens` (default "received"): as of it; `exclude` (default none): roles that are left alone.

    **Needs:** what `quantize-weights` needs, and data. **Guarantees:** LOSSY.

    **Left alone, with the reason:** as by `quantize-weights`.

    **When not to use it:** where weights aren't most of the model; where all weights are as sensitive, which the
    report shows.
    """

    name: ClassVar[str] = "allocate-bits"
    family: ClassVar[str] = "quantize"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    targets: ClassVar[tuple[str, ...]] = ("cpu", "cuda")
    paper: ClassVar[str] = "Pushing the Limits of Large Language Model Quantization via the Linearity Theorem"
    needs = ("second-moment",)

    def __init__(
        self,
        budget: float | str = 4.25,
        candidates: list[dict[str, Any]] | None = None,
        samples: int = 2,
        symmetric: bool = False,
        rounding: str = "gptq",
        tokens: str = "received",
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.budget = budget
        self._budget = parsed(budget)
        if samples < 1:
            raise ValueError(f"samples must be at least 1, not {samples}")
        self.samples, self.symmetric, self.rounding, self.tokens = samples, symmetric, rounding, tokens
        self.exclude = list(exclude or ())
        self.candidates = [dict(one) for one in (CANDIDATES if candidates is None else candidates)]
        self._quantizer({})  # so that wrong options are told now
        if not self.candidates:
            raise ValueError("candidates must hold at least one set of options, such as {bits: 4, group_size: 32}")
        for one in self.candidates:
            self._quantizer({"": one})
        self.sites_chosen: dict[str, dict[str, Any]] = {}
        self.latency: dict[str, Any] | None = None
        self.frontier: list[tuple[float, float]] = []
        """Bytes and expected losses of some allocations, the chosen one last; empty where a budget is of time."""

    def option_values(self) -> dict[str, Any]:
        """See the base; with what was chosen, once it is."""
        found = {} if self.expected is None else {"sites": self.sites_chosen}
        timed: dict[str, Any] = {} if self.latency is None else {"latency": self.latency}
        timed |= {"frontier": self.frontier} if self.frontier else {}
        return {**super().option_values(), **timed, **found}

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        assert self.calibration is not None
        self.latency, self.expected, self.sites_chosen = None, None, {}
        quantizer = self._quantizer({})
        attention = attention_sites(model, infer(model))
        groups = _joined([group.sites for group in quantizer.groups(model, attention)])
        self.sites = list(quantizer.sites)
        if not groups:
            return False
        items = self._items(model, groups, attention)
        chosen = self._allocated(model, items, groups)
        self.frontier = [] if self._budget.timed else _some(frontier(items), chosen)
        self.expected = chosen.loss
        for sites, choice in zip(groups, chosen.chosen, strict=True):
            options = dict(self._candidates_for(sites))[choice.name]
            for site in sites:
                self.sites_chosen[site.weight.name or ""] = options
        last = self._quantizer(self.sites_chosen)
        last.calibration, last.profile, last.assumptions = self.calibration, self.profile, self.assumptions
        changed = last.apply(model)
        self.sites = last.sites
        return changed

    def _candidates_for(self, sites: list[LinearSite]) -> list[tuple[str, dict[str, Any]]]:
        """Options that the weights of some sites may get, each with a name."""
        if not any(site.role in TABLES for site in sites):
            return [(str(index), options) for index, options in enumerate(self.candidates)]
        found = []
        for index, options in enumerate(self.candidates):
            given = self._setting(options)
            if given.grid == "int" and given.bits in _TABLE_BITS:
                group = table_group(given.group_size, sites[0])
                plain = {"bits": given.bits, "group_size": group, "rounding": "nearest"}
                found.append((str(index), {**plain, "symmetric": True}))
                if given.bits < _TABLE_BITS[-1]:
                    # Zero points take a quarter of the error of SmolLM2's table in 4 bits, and 3 % more bytes.
                    found.append((f"{index} with zero points", {**plain, "symmetric": False}))
        return found or [("table", {"bits": 8, "group_size": table_group(32, sites[0]), "rounding": "nearest"})]

    def _setting(self, options: Mapping[str, Any]) -> Setting:
        return Setting().with_options({"symmetric": self.symmetric, **options})

    def _rounding_of(self, options: Mapping[str, Any]) -> Setting:
        """The setting with the rounding that `quantize-weights` will use."""
        return self._setting({"rounding": self.rounding, **options})

    def _quantizer(self, sites: Mapping[str, Mapping[str, Any]]) -> QuantizeWeights:
        return QuantizeWeights(
            symmetric=self.symmetric,
            rounding=self.rounding,
            tokens=self.tokens,
            exclude=self.exclude,
            sites={name: dict(options) for name, options in sites.items()},
        )

    def _items(self, model: ir.Model, groups: list[list[LinearSite]], attention: list[AttentionSite]) -> list[Item]:
        """What may be done to each group of sites, with bytes and the divergence to be expected."""
        assert self.calibration is not None
        measured = [self._measured(sites) for sites in groups]
        self._check_bytes(measured, groups)
        gains = self._gains(model, groups, attention)
        tried = self.calibration.counted("sensitivity", self._sensitivities(model, groups), len(groups))
        return [
            Item(sites[0].weight.name or "weight", tuple(one.choice(per_error, gains) for one in choices))
            for sites, choices, per_error in zip(groups, measured, tried, strict=True)
        ]

    def _measured(self, sites: list[LinearSite]) -> list[_Measured]:
        """What each choice for some sites takes, and its errors."""
        read = {site.weight.name or "": weight_rows(site) for site in sites}
        found = []
        for name, options in self._candidates_for(sites):
            setting = self._rounding_of(options)
            each = {weight: _measured(rows, setting) for weight, rows in read.items()}
            size = math.fsum(taken for taken, _ in each.values())
            squared = {weight: lost for weight, (_, lost) in each.items()}
            found.append(_Measured(name, size, squared, setting.calibrated))
        return found

    def _gains(
        self, model: ir.Model, groups: list[list[LinearSite]], attention: list[AttentionSite]
    ) -> dict[str, float]:
        """What the rounding leaves of the errors of rounding to nearest, by weight."""
        probe = self._rounding_of(PROBE)
        sites = [site for group in groups for site in group if not any(one.role in TABLES for one in group)]
        if not probe.calibrated or not sites:
            return {}
        assert self.calibration is not None
        weights = TokensOf(model, attention, self.tokens, self._quantizer({}).token_roles)
        return rounding_gains(model, sites, probe, self.calibration, weights)

    def _check_bytes(self, measured: list[list[_Measured]], groups: list[list[LinearSite]]) -> None:
        """Refuse a budget of bytes that can't be kept, before the trials, which take minutes."""
        count = _count(groups)
        most = self._budget.most_bytes(count) if self._budget.sized else math.inf
        fewest = math.fsum(min(one.size for one in choices) for choices in measured)
        if fewest > most * (1 + 1e-9):  # sums of floats
            raise UsageError(
                f"The budget {self.budget!r} can't be kept: the smallest candidates take {fewest / 1e6:.4g} MB, "
                f"{fewest * 8 / count:.4g} bits a weight."
            )

    def _sensitivities(self, model: ir.Model, groups: list[list[LinearSite]]) -> Iterator[float]:
        """What the model loses for each squared error of the weights of a group, as it is known."""
        assert self.calibration is not None
        probe, by = self._setting(PROBE), self.calibration
        made = TrialCache(by.cache, model, by.data.fingerprint, str(self.samples), repr(probe), MEANING)
        names = [" ".join(dict.fromkeys(site.weight.name or "" for site in sites)) for sites in groups]
        new = [sites for sites, name in zip(groups, names, strict=True) if made.load(name) is None]
        errors: list[float] = []

        def rounded() -> Iterator[dict[str, Array]]:
            for sites in new:
                changed, error = _rounded(sites, probe)
                errors.append(error)
                yield changed

        losses: Iterator[float] = iter(())
        if new:
            # All of them, so that a loss doesn't hang on which were known.
            weights = list(dict.fromkeys(site.weight for sites in groups for site in sites))
            trials = Trials(
                model, weights, by.feeds(model, self.samples), threads=by.threads, jobs=by.jobs, together=len(new)
            )  # fmt: skip
            losses = trials.losses(rounded())
        number = 0
        for name in names:
            if (known := made.load(name)) is None:
                loss = next(losses)
                known = np.array([loss, errors[number]])
                number += 1
                made.save(name, known)
            loss, error = known
            yield float(loss / error) if error else 0.0

    def _allocated(self, model: ir.Model, items: list[Item], groups: list[list[LinearSite]]) -> Allocation:
        budget = self._budget
        if budget.divergence is not None:
            steps = frontier(items)
            if (best := steps[-1].loss) > budget.divergence:
                raise UsageError(
                    f"The budget {self.budget!r} can't be kept: the largest candidates are expected to lose {best:.3g}."
                )
            return next(one for one in steps if one.loss <= budget.divergence)
        most_bytes = budget.most_bytes(_count(groups)) if budget.sized else None
        if not budget.timed:
            assert most_bytes is not None
            return allocate(items, most_bytes)
        assert self.calibration is not None
        settings = [[self._setting(options) for _, options in self._candidates_for(sites)] for sites in groups]
        timed = latency(model, groups, settings, self.calibration, self.profile)
        if not timed.floats:
            raise UsageError(f"The budget {self.budget!r} needs products with weights; there are tables alone here.")
        most_seconds = budget.most_seconds(timed.floats)
        least = sum(min(seconds) for seconds in timed.seconds)
        if least > most_seconds:
            raise UsageError(
                f"The budget {self.budget!r} can't be kept: the fastest candidates' products take {least * 1e3:.3g} ms "
                f"for a token here, {least / timed.floats:.0%} of the {timed.floats * 1e3:.3g} ms of float ones."
            )
        if most_bytes is not None:
            found = allocate_both(items, most_bytes, timed.seconds, most_seconds)
        else:
            found = allocate([_costing(*one) for one in zip(items, timed.seconds, strict=True)], most_seconds)
        self.latency = _said(timed, items, found, self.calibration.threads)
        return found


def _some(steps: list[Allocation], chosen: Allocation) -> list[tuple[float, float]]:
    """Some of the best allocations from the fewest bytes to the most, and the chosen one."""
    every = max(1, -(-len(steps) // SHOWN))
    kept = [*steps[:-1:every], steps[-1]]
    return [(one.cost, one.loss) for one in (*kept, chosen)]


def _count(groups: list[list[LinearSite]]) -> int:
    """Numbers in the weights of all groups."""
    return sum({site.weight: site.inputs * site.outputs for sites in groups for site in sites}.values())


def _costing(item: Item, costs: list[float]) -> Item:
    """An item whose choices have other costs."""
    pairs = zip(item.choices, costs, strict=True)
    return Item(item.name, tuple(Choice(one.name, cost, one.loss) for one, cost in pairs))


def _said(timed: Latency, items: list[Item], found: Allocation, threads: int | None) -> dict[str, Any]:
    """What the report tells of times."""
    predicted = sum(
        costs[[choice.name for choice in item.choices].index(chosen.name)]
        for item, costs, chosen in zip(items, timed.seconds, found.chosen, strict=True)
    )
    runtime, _, _ = this_machine()
    counted = "its usual number of threads" if threads is None else f"{threads} thread{'s' if threads > 1 else ''}"
    return {
        "predicted_ms": round(predicted * 1e3, 4),
        "float_ms": round(timed.floats * 1e3, 4),
        "part": round(predicted / timed.floats, 4),
        "measured": f"{timed.kinds} kinds of products at one token, in turn, by {runtime} with {counted}",
    }


def _rounded(sites: list[LinearSite], probe: Setting) -> tuple[dict[str, Array], float]:
    """The weights of some sites by name, rounded, and the squared error of that."""
    read = {site.weight.name or "": weight_rows(site) for site in sites}
    rounded = {name: probe.round(rows).dequantized() for name, rows in read.items()}
    changed = {}
    for site in sites:
        assert site.weight.const_value is not None
        name = site.weight.name or ""
        changed[name] = as_stored(site, rounded[name], site.weight.const_value.dtype.numpy())
    return changed, sum(float(np.square(read[name] - rounded[name]).sum()) for name in read)


def _joined(groups: list[list[LinearSite]]) -> list[list[LinearSite]]:
    """Groups of sites, those that share a weight (a tied head and its embedding) as one."""
    found: dict[ir.Value, list[LinearSite]] = {}
    for sites in groups:
        met = next((found[site.weight] for site in sites if site.weight in found), [])
        met += sites
        for site in sites:
            found[site.weight] = met
    return list({id(sites): sites for sites in found.values()}.values())


def _measured(rows: Floats, setting: Setting) -> tuple[float, float]:
    """Bytes of a weight [N, K] in a setting, and its squared error, both from some of its rows."""
    some = rows[:: max(1, len(rows) // ROWS)]
    weight = nearest(setting).round(np.ascontiguousarray(some)).weight
    whole = len(rows) / len(some)
    # All weights share a codebook.
    bytes_ = packed_bytes(weight) - (0 if weight.levels is None else weight.levels.nbytes)
    return bytes_ * whole, float(np.square(some - weight.dequantized()).sum()) * whole
