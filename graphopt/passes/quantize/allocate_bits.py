"""allocate-bits: each weight the bits and groups that lose least under a budget."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.linear_sites import LinearSite
from graphopt.analysis.shapes import infer
from graphopt.calibration.cache import TrialCache
from graphopt.passes.base import Guarantee, SearchPass
from graphopt.passes.quantize.packing import packed_bytes
from graphopt.passes.quantize.quantize_weights import TABLES, QuantizeWeights
from graphopt.passes.quantize.setting import Setting
from graphopt.passes.quantize.site_weights import as_stored, table_group, weight_rows
from graphopt.search.allocation import Allocation, Choice, Item, allocate, frontier
from graphopt.verification.trials import Trials

Measure = Literal["bits", "bytes", "kl"]
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
ROWS = 96
"""Rows of a weight by which its errors are told."""
_UNITS = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_TABLE_BITS = (4, 8)
"""Of what is looked up by rows."""
Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


class AllocateBits(SearchPass):
    """Quantize weights, each with the bits and groups that together lose least under a budget.

        minimise Σ_l α_l · e_l(c_l)   with   Σ_l bytes_l(c_l) ≤ budget
        e_l(c) = |W_l − Q_c(W_l)|² / |W_l|²,   α_l = D_l(p) / e_l(p)

    For small errors the loss of a model is a sum over its weights, each in proportion to the weight's relative squared
    error. So one trial a weight is enough: D_l(p) is the divergence of the model's outputs from the original's where
    this weight alone is rounded to nearest (in 4 bits, groups of 128). The allocation is the best there is, by dynamic
    programming. What was chosen is among the options that the report lists, as `sites` of `quantize-weights`.

    Papers: Pushing the Limits of Large Language Model Quantization via the Linearity Theorem (sensitivity, and the
    allocation by dynamic programming). There α is measured with Gaussian noise added to a weight; here with an error
    of rounding, whose directions are those of the errors to come.

    1. Weights that read one value (queries, keys and values) get one choice, since they are written as one.
    2. A trial exchanges weights within one session, on the first `samples` of the data; no model is written for it.
    3. Errors are those of rounding to nearest, from some rows of a weight, whatever rounding follows: GPTQ lowers them
       all, and their order stays.
    4. What a trial gave is kept in the cache of calibration as soon as it is made. It doesn't hang on the budget or the
       candidates, so that another budget, or a run that was interrupted, takes up what is there.
    5. Then `quantize-weights` runs with what was chosen.

    **Options:** `budget` (default 4.25): bits per weight, all weights together; or bytes of the weights, as "80MB"; or
    a divergence that may be expected, as "kl=0.1": the fewest bytes that keep below it; `candidates` (default: 2 bits
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
        self._measure, self._limit = _parsed(budget)
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

    def option_values(self) -> dict[str, Any]:
        """See the base; with what was chosen, once it is."""
        found = {} if self.expected is None else {"sites": self.sites_chosen}
        return {**super().option_values(), **found}

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        assert self.calibration is not None
        quantizer = self._quantizer({})
        attention = attention_sites(model, infer(model))
        groups = _joined([group.sites for group in quantizer.groups(model, attention)])
        self.sites = list(quantizer.sites)
        if not groups:
            return False
        items = self._items(model, groups)
        chosen = self._allocated(items, groups)
        self.expected = chosen.loss
        self.sites_chosen = {}
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
                plain = {"bits": given.bits, "group_size": group, "rounding": "nearest", "symmetric": True}
                found.append((str(index), plain))
        return found or [("table", {"bits": 8, "group_size": table_group(32, sites[0]), "rounding": "nearest"})]

    def _setting(self, options: Mapping[str, Any]) -> Setting:
        return Setting().with_options({"symmetric": self.symmetric, **options})

    def _quantizer(self, sites: Mapping[str, Mapping[str, Any]]) -> QuantizeWeights:
        return QuantizeWeights(
            symmetric=self.symmetric,
            rounding=self.rounding,
            tokens=self.tokens,
            exclude=self.exclude,
            sites={name: dict(options) for name, options in sites.items()},
        )

    def _items(self, model: ir.Model, groups: list[list[LinearSite]]) -> list[Item]:
        """What may be done to each group of sites, with bytes and the divergence to be expected."""
        assert self.calibration is not None
        weights = list(dict.fromkeys(site.weight for sites in groups for site in sites))
        samples = self.calibration.feeds(model, self.samples)
        probe = self._setting(PROBE)
        made = TrialCache(
            self.calibration.cache, model, self.calibration.data.fingerprint, str(self.samples), repr(probe)
        )
        trials: Trials | None = None
        items = []
        for number, sites in enumerate(groups):
            if self.calibration.progress is not None:
                self.calibration.progress("sensitivity", number, len(groups))
            read = {site.weight.name or "": weight_rows(site) for site in sites}
            known = made.load(" ".join(read))
            if known is None:
                trials = trials or Trials(model, weights, samples, threads=self.calibration.threads)
                known = _tried(trials, sites, read, probe)
                made.save(" ".join(read), known)
            loss, error = known
            per_error = float(loss / error) if error else 0.0
            choices = []
            for name, options in self._candidates_for(sites):
                setting = self._setting(options)
                bytes_, squared = 0.0, 0.0
                for rows in read.values():
                    each, lost = _measured(rows, setting)
                    bytes_, squared = bytes_ + each, squared + lost
                choices.append(Choice(name, bytes_, per_error * squared))
            items.append(Item(sites[0].weight.name or "weight", tuple(choices)))
        return items

    def _allocated(self, items: list[Item], groups: list[list[LinearSite]]) -> Allocation:
        if self._measure == "kl":
            steps = frontier(items)
            return next((one for one in steps if one.loss <= self._limit), steps[-1])
        weights = {site.weight: site.inputs * site.outputs for sites in groups for site in sites}
        numbers = sum(weights.values())
        return allocate(items, self._limit if self._measure == "bytes" else self._limit * numbers / 8)


def _tried(trials: Trials, sites: list[LinearSite], read: Mapping[str, Floats], probe: Setting) -> Array:
    """What the model loses where the weights of some sites are rounded, and the squared error of that, [2]."""
    rounded = {name: probe.round(rows).dequantized() for name, rows in read.items()}
    changed = {}
    for site in sites:
        assert site.weight.const_value is not None
        name = site.weight.name or ""
        changed[name] = as_stored(site, rounded[name], site.weight.const_value.dtype.numpy())
    error = sum(float(np.square(read[name] - rounded[name]).sum()) for name in read)
    return np.array([trials.loss(changed), error])


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
    plain = setting.with_options({"rounding": "nearest", "weighed": False, "compensation": "none"})
    weight = plain.round(np.ascontiguousarray(some)).weight
    whole = len(rows) / len(some)
    # All weights share a codebook.
    bytes_ = packed_bytes(weight) - (0 if weight.levels is None else weight.levels.nbytes)
    return bytes_ * whole, float(np.square(some - weight.dequantized()).sum()) * whole


def _parsed(budget: float | str) -> tuple[Measure, float]:
    """What a budget counts, and how much of it there is.

    Raises:
        ValueError: It isn't of a known form.
    """
    if isinstance(budget, int | float) and not isinstance(budget, bool) and 0 < budget < 32:
        return "bits", float(budget)
    text = str(budget).strip().lower()
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)", text):
        return "bytes", float(match[1]) * _UNITS[match[2]]
    if match := re.fullmatch(r"kl\s*=\s*(\d+(?:\.\d+)?)", text):
        return "kl", float(match[1])
    raise ValueError(f"budget is bits per weight (4.25), bytes (80MB) or a divergence (kl=0.1), not {budget!r}")
