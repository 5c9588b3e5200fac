"""drop-layers: branches or layers that a model can do without removed, their caches with them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal, get_args

import onnx_ir as ir

from graphopt.analysis.depth_units import DepthUnit, DepthUnits, depth_units
from graphopt.analysis.shapes import ShapeFacts, infer
from graphopt.calibration.calibration import Calibration
from graphopt.errors import UsageError
from graphopt.passes.base import Guarantee, SearchPass
from graphopt.passes.depth.bypass import Norms, bypass, obstacles
from graphopt.passes.depth.closeness import Closeness, Span, closeness
from graphopt.passes.depth.gates import gated
from graphopt.passes.depth.healing import Heal, heal
from graphopt.passes.depth.positions import Position, by_position
from graphopt.search.allocation import Choice, Item, allocate
from graphopt.search.evolutionary import evolve
from graphopt.search.greedy import greedy, trials_at_most
from graphopt.verification.quality.tasks import guess_task
from graphopt.verification.trials import Judge, Trials

Granularity = Literal["block", "attention", "mlp", "joint"]
Score = Literal[
    "loss", "perplexity", "influence", "angular", "contribution", "last", "first", "uniform", "alternate", "symmetric"
]
Search = Literal["one-shot", "greedy", "evolutionary", "knapsack"]
Group = tuple[DepthUnit, ...]
"""What goes together: a branch, or the branches of a layer."""
_TRIED = ("loss", "perplexity")
"""Scores that take the model's outputs."""
OF_LANGUAGE, OF_OTHERS = 2, 32
"""Samples that searches see unless told: a window of text has hundreds of distributions to judge by, a picture one."""


class DropLayers(SearchPass):
    """Remove the branches or layers that a model misses least.

        x_{l+1} = x_l + f_l(x_l)   becomes   x_{l+1} = x_l   for the chosen l

    Norms, weights and nodes that served a removed branch alone go with it; so do the cache inputs and outputs of a
    removed attention, and those that stay are numbered without the gap, in the pattern of their names. A branch of any
    kind can go whose input has the shape of its sum: attention, MLP, convolutions, in pre-LN and post-LN models.

    Papers: ShortGPT: Layers in Large Language Models are More Redundant Than You Expect (influence of blocks); What
    Matters in Transformers? Not All Attention is Needed (the same of attention and MLP apart); The Unreasonable
    Ineffectiveness of the Deeper Layers (angular distance over a run of layers); BlockPruner: Fine-grained Pruning for
    Large Language Models (loss after removal, one after the other); EvoPress: Accurate Dynamic Model Compression via
    Evolutionary Search; LAPTOP-Diff: Layer Pruning and Normalized Distillation for Compressing Diffusion Models (a
    knapsack on losses that add up); On the Effect of Dropping Layers of Pre-trained Transformer Models, and Reassessing
    Layer Pruning in LLMs: New Insights and Methods (positions).

    1. Scores, the lowest go first: "loss": the divergence of the outputs from the original's without it; "perplexity":
       the logarithm of a decoder's perplexity on its data without it, over that with it, which looks at the tokens that
       came instead of all that might have; "influence": 1 − cos(x_l, x_{l+1}), the mean over tokens; "contribution":
       |x_{l+1} − x_l| / |x_l|; "angular": the run of neighbours with the least arccos(cos(x_l, x_{l+n})) / π; "last",
       "first", "uniform", "alternate" and "symmetric": the position alone.
    2. Searches, all by loss or perplexity but "one-shot" (what scores lowest, each by itself): "greedy": one after the
       other, or `beam` sets side by side, each grown by the `shortlist` candidates that last cost least;
       "evolutionary": from the one-shot choice on, `generations` of `offspring` that exchange members, judged on one
       sample and the best two on all; "knapsack": the least sum of single losses that removes enough bytes.
    3. A candidate is a run of one session in which branches are switched off; nothing is saved or loaded for it.
    4. What was chosen is among the options that the report lists, as `branches`; given as an option, nothing is
       searched and no data needed. A greedy search lists the best set of each size too, as `path`.
    5. Healing: the last linear layer of the branch before a removed run is refitted on all of the data so that it
       writes what is missing too, W' = W T, with a ridge towards T = 1: "linear": any T; "affine": a factor for each
       channel, and a new bias where there is one. Nothing is added to the graph. Where a normalization stands between
       (post-LN), the branch behind the removed ones is refitted to its own sum instead; where none follows, or with
       "affine", the last norm that they leave gets another scale and shift for each channel; norms of pre-LN models
       stay, and so do convolutions. A linear T has a number
       for each pair of channels: with 4096 tokens for SmolLM2's 576 channels it gives back a third of the divergence
       on other text, and two thirds on the same.
    6. The norm of a post-LN sum stays by default. In MiniLM that loses less than without it where one branch goes
       (rank correlation of similarities 0.957 against 0.929 for the second attention, 0.947 against 0.803 for the
       second MLP), and more where both do (0.886 against 0.919).

    **Options:** `count` (default none): how many go; `fraction` (default 0.1, where `count` isn't given): of all; for
    "knapsack" of their bytes; `granularity` (default "attention"): "attention" or "mlp" branches, "block": layers,
    "joint": branches of any kind; `score` (default "loss"): rule 1; `search` (default "one-shot"): rule 2; `branches`
    (default none): those that go by name, as "attention.7" or "7" for a whole layer, counted from 0; `keep` (default
    0): how many of the first and of the last are never removed; `norms` (default "keep"): what becomes of the
    normalization of a post-LN sum: it stays, or goes with its branch ("remove"); `samples` (default none): of the data
    that searches see; none: 2 for a language model, each token of which is judged, else 32; `beam` (default 1): sets
    that a greedy search keeps side by side; `shortlist` (default 0): candidates that each is grown by, 0 for all;
    `generations` (default 20): of the evolutionary search; `offspring` (default 8): of each of them; `seed` (default
    0): of its draws; `heal` (default "none"): rule 5; `ridge` (default 0): of it, in parts of the mean square of what
    is written; 0: of any T as cross-validation picks it, each half of the samples judging what the other one gives,
    and none of factors.

    **Needs:** data, but for positions and `branches` without healing; a canonical graph. **Guarantees:** LOSSY.

    **Left alone, with the reason:** a branch whose sum has another shape than its skip; one of which something else
    reads more than sizes, such as keys that other layers share; the last attention with a cache.

    **When not to use it:** before a search of anything else that counts layers; on a model that was fine-tuned to need
    all of them, which the losses in the report show.
    """

    name: ClassVar[str] = "drop-layers"
    family: ClassVar[str] = "depth"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = "What Matters in Transformers? Not All Attention is Needed"

    def __init__(
        self,
        count: int | None = None,
        fraction: float | None = None,
        granularity: Granularity = "attention",
        score: Score = "loss",
        search: Search = "one-shot",
        branches: list[str] | None = None,
        keep: int = 0,
        norms: Norms = "keep",
        samples: int | None = None,
        beam: int = 1,
        shortlist: int = 0,
        generations: int = 20,
        offspring: int = 8,
        seed: int = 0,
        heal: Heal = "none",
        ridge: float = 0.0,
    ) -> None:
        super().__init__()
        for option, value, known in (
            ("granularity", granularity, Granularity), ("score", score, Score), ("search", search, Search),
            ("norms", norms, Norms), ("heal", heal, Heal),
        ):  # fmt: skip
            if value not in get_args(known):
                raise ValueError(f"{option} is one of {', '.join(get_args(known))}, not {value!r}")
        if count is not None and fraction is not None:
            raise ValueError("count and fraction both say how many go; give one of them")
        if count is not None and count < 0:
            raise ValueError(f"count must not be negative, not {count}")
        if fraction is not None and not 0 <= fraction < 1:
            raise ValueError(f"fraction must be from 0 to below 1, not {fraction}")
        if search != "one-shot" and score not in _TRIED:
            raise ValueError(f"the search {search!r} goes by loss or perplexity; score {score!r} is for one-shot alone")
        if score == "angular" and granularity != "block":
            raise ValueError("score 'angular' is of a run of layers; give granularity: block")
        at_least_1 = (1 if samples is None else samples, beam, generations, offspring)
        if min(at_least_1) < 1 or min(keep, shortlist) < 0 or ridge < 0:
            raise ValueError("samples, beam, generations and offspring must be at least 1, keep, shortlist and ridge 0")
        self.count = count
        self.fraction = 0.1 if fraction is None and count is None else fraction
        self.granularity, self.score, self.search, self.norms = granularity, score, search, norms
        self.branches = None if branches is None else [str(name) for name in branches]
        self.keep, self.samples, self.beam, self.shortlist = keep, samples, beam, shortlist
        self.generations, self.offspring, self.seed = generations, offspring, seed
        self.heal, self.ridge = heal, ridge
        searches = self.branches is None and score not in get_args(Position)
        self.needs = ("samples",) * searches + ("second-moment",) * (heal != "none")
        self.path: list[dict[str, Any]] = []
        self.expected_surprise: float | None = None

    def option_values(self) -> dict[str, Any]:
        """See the base; with the best set of each size that a greedy search went through."""
        found: dict[str, Any] = {"path": self.path} if self.path else {}
        if self.expected_surprise is not None:
            found["expected_log_perplexity_increase"] = self.expected_surprise
        return {**super().option_values(), **found}

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        self.scores, self.path, self.expected, self.expected_surprise = {}, [], None, None
        facts = infer(model, believe_names=True)
        found = depth_units(model, facts)
        if self.samples is None:
            self.samples = OF_LANGUAGE if guess_task(model).task == "language" else OF_OTHERS
        for node, reason in found.left:
            self.left(node, reason)
        chosen = self._given(model, found, facts) if self.branches is not None else self._found(model, found, facts)
        if not chosen:
            return False
        for unit in chosen:
            gone = f", with its cache ({', '.join(pair.past for pair in unit.caches)})" if unit.caches else ""
            self.applied(unit.branch.add, f"{unit.name} removed: {unit.bytes} bytes of weights{gone}")
        if self.heal != "none":
            self._healed(model, found, chosen)
            facts = infer(model, believe_names=True)
        bypass(model, found, chosen, facts, norms=self.norms)
        self.branches = [unit.name for unit in chosen]
        return True

    def _healed(self, model: ir.Model, found: DepthUnits, chosen: list[DepthUnit]) -> None:
        assert self.calibration is not None
        done = heal(
            model, found.units, chosen, self.calibration, form=self.heal, ridge=self.ridge, norms=self.norms
        )  # fmt: skip
        for unit, rest in done.norms:
            self.applied(
                unit.branch.add, f"the norm behind {unit.name} refitted: {rest:.1%} of its squared error is left"
            )
        for unit, rest in done.writers:
            self.applied(unit.branch.add, f"{unit.name} refitted: {rest:.1%} of the squared error at its sum is left")
        for unit, reason in done.left:
            self.left(unit.branch.add, f"{unit.name} isn't refitted: {reason}")

    def _given(self, model: ir.Model, found: DepthUnits, facts: ShapeFacts) -> list[DepthUnit]:
        assert self.branches is not None
        try:
            chosen = found.named(self.branches)
        except ValueError as error:
            raise UsageError(f"drop-layers: {error}.") from error
        for unit, reason in obstacles(model, found, chosen, facts).items():
            raise UsageError(f"drop-layers: {unit.name} can't be removed: {reason}.")
        return chosen

    def _found(self, model: ir.Model, found: DepthUnits, facts: ShapeFacts) -> list[DepthUnit]:
        groups = self._groups(model, found, facts)
        free = groups[self.keep : len(groups) - self.keep]
        count = self.count if self.count is not None else math.floor((self.fraction or 0) * len(groups) + 0.5)
        self._spare_a_cache(found, free, count)
        if count > len(free):
            raise UsageError(
                f"drop-layers: {count} can't go, since there are {len(free)} of granularity {self.granularity!r} that "
                "may be removed."
            )
        if not count and self.search != "knapsack":
            return []
        chosen = self._chosen(model, free, count)
        units = sorted((unit for group in chosen for unit in group), key=lambda unit: unit.index)
        for unit, reason in obstacles(model, found, units, facts).items():
            raise UsageError(f"drop-layers: {unit.name} can't be removed with the others: {reason}.")
        return units

    def _spare_a_cache(self, found: DepthUnits, free: list[Group], count: int) -> None:
        """Leave the last attention with a cache out of what may go, where all of them could."""
        own = set() if found.interface is None else {pair.past for pair in found.interface.pairs}
        cached = [group for group in free if any(pair.past in own for unit in group for pair in unit.caches)]
        held = {pair.past for group in cached for unit in group for pair in unit.caches}
        if cached and own <= held and (count >= len(cached) or self.search == "knapsack"):
            free.remove(cached[-1])
            last = next(unit for unit in cached[-1] if unit.caches)
            self.left(last.branch.add, f"{last.name} isn't removed: its cache tells how many tokens came before")

    def _groups(self, model: ir.Model, found: DepthUnits, facts: ShapeFacts) -> list[Group]:
        """What may be removed, in order."""
        groups: list[Group]
        if self.granularity == "block":
            groups = [tuple(layer) for layer in found.layers]
        else:
            groups = [(unit,) for unit in found.units if self.granularity in ("joint", unit.kind)]
        free = []
        for group in groups:
            blocked = obstacles(model, found, group, facts)
            for unit, reason in blocked.items():
                self.left(unit.branch.add, f"{unit.name} isn't removed: {reason}")
            if not blocked:
                free.append(group)
        return free

    def _chosen(self, model: ir.Model, groups: list[Group], count: int) -> list[Group]:
        if self.score in get_args(Position):
            return [groups[i] for i in by_position(self.score, len(groups), count)]  # type: ignore[arg-type]
        assert self.calibration is not None
        if self.score == "angular":
            return self._run(model, groups, count)
        if self.score not in _TRIED:
            measured = self._closeness(model, [Span(group[0], group[-1]) for group in groups])
            of: Callable[[Closeness], float] = {
                "influence": lambda c: 1 - c.cosine,
                "contribution": lambda c: c.change,
            }[self.score]
            self.scores = {_label(group): of(c) for group, c in zip(groups, measured, strict=True)}
            return _lowest(groups, self.scores, count)
        return _LossSearch(self, model, groups, self.calibration, count).chosen()

    def _run(self, model: ir.Model, groups: list[Group], count: int) -> list[Group]:
        """The run of layers that turns the stream least."""
        starts = [i for i in range(len(groups) - count + 1) if _neighbours(groups[i : i + count])]
        if not starts:
            raise UsageError(f"drop-layers: there is no run of {count} neighbours that may be removed.")
        measured = self._closeness(model, [Span(groups[i][0], groups[i + count - 1][-1]) for i in starts])
        self.scores = {_label(groups[i]): c.angle for i, c in zip(starts, measured, strict=True)}
        best = starts[min(range(len(starts)), key=lambda place: measured[place].angle)]
        return groups[best : best + count]

    def _closeness(self, model: ir.Model, spans: Sequence[Span]) -> list[Closeness]:
        assert self.calibration is not None
        return closeness(model, spans, self.calibration, self.samples or OF_OTHERS, norms=self.norms)


@dataclasses.dataclass
class _LossSearch:
    """A search by the loss of trials."""

    options: DropLayers
    model: ir.Model
    groups: list[Group]
    calibration: Calibration

    count: int

    def __post_init__(self) -> None:
        options, together = self.options, len(self.groups)
        self._gated = gated(self.model, [u for group in self.groups for u in group], norms=options.norms)
        samples = self.calibration.feeds(self.model, options.samples)
        trials = together
        if options.search == "greedy":
            trials = trials_at_most(together, self.count, options.beam, options.shortlist or None)
            if options.shortlist and self.count > 1:  # of most rounds
                together = min(together, options.beam * options.shortlist)
        elif options.search == "evolutionary":
            trials += options.generations * options.offspring
            together = min(together, options.offspring)
        self._judge: Judge = "perplexity" if options.score == "perplexity" else "divergence"
        self._trials = Trials(
            self._gated.model, list(self._gated.gates.values()), samples, threads=self.calibration.threads,
            jobs=self.calibration.jobs, together=together, trials=trials, judge=self._judge,
        )  # fmt: skip
        self._known: dict[tuple[int, ...], float] = {}

    def chosen(self) -> list[Group]:
        """The groups that go."""
        options, indices, count = self.options, range(len(self.groups)), self.count
        if options.search == "greedy":
            shortlist = options.shortlist or None
            steps = greedy(
                indices, self._losses, count, beam=options.beam, shortlist=shortlist,
                progress=self.calibration.progress, what="choosing what goes",
            )  # fmt: skip
            best = steps[-1].chosen
            called = {"divergence": "divergence", "perplexity": "log_perplexity_increase"}[self._judge]
            options.path = [
                {"branches": [_label(self.groups[i]) for i in step.chosen], called: step.loss} for step in steps
            ]
        else:
            single = self._single()
            best = tuple(sorted(sorted(indices, key=lambda i: (single[i], i))[:count]))
            if options.search == "knapsack":
                best = self._knapsack(single)
            elif options.search == "evolutionary":
                rounds = ((2, 1), (1, len(self._trials))) if len(self._trials) > 1 else ((1, 1),)
                best = evolve(
                    indices, self._losses, best, generations=options.generations, offspring=options.offspring,
                    rounds=rounds, seed=options.seed, progress=self.calibration.progress,
                ).chosen  # fmt: skip
        options.scores = {_label(self.groups[key[0]]): loss for key, loss in self._known.items() if len(key) == 1}
        if best:
            (expected,) = self._losses([best])
            if self._judge == "divergence":
                options.expected = expected
            else:
                options.expected_surprise = expected
        return [self.groups[i] for i in best]

    def _losses(self, sets: Sequence[tuple[int, ...]], samples: int | None = None) -> Iterator[float]:
        """The losses without some sets of groups, in their order, as they are known."""
        known = self._known if samples is None or samples >= len(self._trials) else {}
        new = [chosen for chosen in sets if chosen not in known]
        closed = (self._gated.closed(u for i in chosen for u in self.groups[i]) for chosen in new)
        found = self._trials.losses(closed, samples)
        for chosen in sets:
            if chosen not in known:
                known[chosen] = next(found)
            yield known[chosen]

    def _single(self) -> list[float]:
        """The loss without each alone."""
        count = len(self.groups)
        return list(self.calibration.counted("trying each branch", self._losses([(i,) for i in range(count)]), count))

    def _knapsack(self, single: list[float]) -> tuple[int, ...]:
        """The least sum of losses for which enough goes: as many as `count`, or `fraction` of the bytes."""
        count = self.options.count
        costs = [1 if count is not None else sum(unit.bytes for unit in group) for group in self.groups]
        gone = count if count is not None else (self.options.fraction or 0) * sum(costs)
        items = [
            Item(_label(group), (Choice("keep", cost, 0.0), Choice("drop", 0.0, loss)))
            for group, cost, loss in zip(self.groups, costs, single, strict=True)
        ]
        found = allocate(items, sum(costs) - gone)
        return tuple(i for i, choice in enumerate(found.chosen) if choice.name == "drop")


def _neighbours(groups: Sequence[Group]) -> bool:
    """Whether they stand one behind the other on one stream."""
    units = [unit for group in groups for unit in group]
    return all(a.stream == b.stream and b.layer - a.layer <= 1 for a, b in itertools.pairwise(units))


def _label(group: Group) -> str:
    return group[0].name if len(group) == 1 else str(group[0].layer)


def _lowest(groups: list[Group], scores: dict[str, float], count: int) -> list[Group]:
    order = sorted(range(len(groups)), key=lambda i: (scores[_label(groups[i])], i))
    return [groups[i] for i in sorted(order[:count])]
