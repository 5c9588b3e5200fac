"""What a report says of the steps of a recipe, as plain cells: the terminal and the HTML page print the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.report import units
from graphopt.verification.quality.floors import shown
from graphopt.verification.quality.metrics import Scale

Data = Mapping[str, Any]


def step_table(steps: Sequence[Data] | None) -> tuple[list[str], list[list[str]]]:
    """The headers and the cells of one row a step; both empty where no steps were told."""
    if not steps:
        return [], []
    named: Sequence[Data] = next((step["metrics"] for step in steps if step.get("metrics")), [])
    cached = any(step.get("cache_bytes") is not None for step in steps)
    writes = any(step.get("token_ratio") is not None for step in steps)
    timed = {"ratio": "a prompt", "token_ratio": "a token"} if writes else {"ratio": "CPU time"}
    timed = timed if any(step.get("ratio") is not None for step in steps) else {}
    headers = ["behind", "bytes on disk", *(["cache a token"] if cached else []), *(m["name"] for m in named)]
    headers += timed.values()
    rows = []
    for step in steps:
        row = [str(step.get("pass") or "the original"), units.size(step.get("bytes"))]
        if cached:
            row.append(units.size(step.get("cache_bytes")))
        own = {metric["name"]: metric for metric in step.get("metrics") or []}
        for metric in named:
            value = own[metric["name"]].get("value") if own else metric.get("reference")
            scale: Scale = "share" if metric.get("scale") == "share" else "number"
            row.append(units.MISSING if value is None else shown(float(value), scale))
        row += [units.ratio(step.get(key)) for key in timed]
        rows.append(row)
    return headers, rows
