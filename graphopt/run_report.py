"""What a pipeline did: the size of the model, one record a pass, and the verdicts."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import onnx_ir as ir

from graphopt.analysis.cost import Counted, cost
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.kv_interface import kv_interface
from graphopt.passes.base import Guarantee, Site
from graphopt.verification.verdict import Verdict

Status = Literal["applied", "unchanged", "rolled back", "skipped"]


@dataclasses.dataclass(frozen=True)
class Stats:
    """Size of a model: nodes over all graphs, parameters and bytes of used weights, FLOPs of one inference.

    `unknown_flops` counts the nodes whose operations aren't in `flops`, because a shape isn't known. `cache_bytes` are
    those by which the KV cache of a decoder grows a token; None where there is none, or its sizes can't be told.
    """

    nodes: int
    parameters: int
    weight_bytes: int
    flops: int
    unknown_flops: int
    cache_bytes: float | None = None

    @classmethod
    def of(
        cls,
        model: ir.Model,
        facts: ShapeFacts | None = None,
        counted: Counted | None = None,
    ) -> Stats:
        """Measure `model` (FLOPs with dynamic dimensions bound as `graphopt.analysis.cost` says).

        Args:
            model: The model.
            facts: Its shapes, where they are inferred already.
            counted: As for `graphopt.analysis.cost.cost`.
        """
        found = cost(model, facts, activations=False, counted=counted)
        decoder = kv_interface(model)
        return cls(
            found.node_count,
            found.parameters,
            found.weight_bytes,
            found.flops,
            found.unknown_flops,
            None if decoder is None else decoder.bytes_a_token,
        )


@dataclasses.dataclass
class PassRecord:
    """What one run of one pass did.

    Attributes:
        name: The pass.
        family: Its family; "other" for passes that aren't graphopt's.
        guarantee: "exact" or "lossy"; "unstated" for others' passes.
        options: The options in force.
        round: The round of the pipeline, from 1.
        seconds: Wall time of the pass alone.
        status: "applied", "unchanged", "rolled back" or "skipped".
        detail: Why it was rolled back or skipped.
        before: Size before.
        after: Size after.
        sites: What was done at each site, or why not.
        verdict: The verification that the pass was checked by, where there was one.
    """

    name: str
    family: str
    guarantee: str
    options: dict[str, Any]
    round: int
    seconds: float = 0.0
    status: Status = "unchanged"
    detail: str = ""
    before: Stats | None = None
    after: Stats | None = None
    sites: list[Site] = dataclasses.field(default_factory=list)
    verdict: Verdict | None = None


@dataclasses.dataclass
class RunReport:
    """What a pipeline did.

    Attributes:
        records: One for each run of a pass, in order.
        before: Size of the model given.
        after: Size of the result.
        verdict: The last verification of the result, None where verification was off.
        seconds: Wall time of the passes, without verification.
        verify_seconds: Wall time of verification and structural checks.
    """

    records: list[PassRecord]
    before: Stats
    after: Stats
    verdict: Verdict | None
    seconds: float
    verify_seconds: float

    @property
    def rolled_back(self) -> list[PassRecord]:
        """The passes that failed and were taken back."""
        return [r for r in self.records if r.status == "rolled back"]

    @property
    def modified(self) -> bool:
        """Whether anything was changed."""
        return any(r.status == "applied" for r in self.records)

    def left(self) -> list[tuple[str, Site]]:
        """Sites left alone, each with its pass: those of the last run of every pass, whose word is final.

        Where a pass ran before a lossy one too, nodes that the lossy one made are nothing that it left.
        """
        ran = [r for r in self.records if r.status in ("applied", "unchanged")]
        last = {r.name: r for r in ran}
        lossy = next((i for i, r in enumerate(ran) if r.guarantee == Guarantee.LOSSY.value), len(ran))
        before: dict[str, set[str]] = {}
        for record in ran[:lossy]:
            before.setdefault(record.name, set()).update(site.node for site in record.sites)

        def known(name: str, site: Site) -> bool:
            return lossy == len(ran) or name not in before or site.node in before[name]

        return [(n, site) for n, r in last.items() for site in r.sites if site.outcome == "left" and known(n, site)]
