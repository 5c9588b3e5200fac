"""What a report says, as plain rows and sentences: the terminal and the HTML page print the same ones.

Every function takes the dictionary of `Report.to_dict()` and bears missing parts: a run without verification, without
timing, of passes that aren't graphopt's.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from graphopt.report import measured, units
from graphopt.report.quality_lines import missed_floors, quality_headline

Data = Mapping[str, Any]

_VARYING = re.compile(r"'[^']*'|(?<!\w)[-−]?\d[\d,]*(?:\.\d+)?(?!\w)")

FEW = 11
"""Changes of one search that are listed."""


@dataclasses.dataclass(frozen=True)
class SizeRow:
    """One figure before and after, in words and as numbers (None where it isn't known)."""

    label: str
    before: str
    after: str
    change: str
    numbers: tuple[float | None, float | None]


@dataclasses.dataclass(frozen=True)
class Effect:
    """What one run of a pass did.

    Attributes:
        name: The pass.
        family: Its family.
        guarantee: "exact", "lossy" or "unstated".
        options: Its options as YAML, or an empty string.
        round: The round of the pipeline.
        status: "applied", "unchanged", "rolled back" or "skipped".
        detail: Why it was rolled back or skipped.
        sites: How many sites it rewrote; None where it doesn't report sites.
        nodes: Nodes before and after.
        bytes: Bytes of used weights before and after.
        seconds: Wall time of the pass alone.
        verification: The result of the check after it, in words; "" where there was none of its own.
        examples: What was done at its first sites.
    """

    name: str
    family: str
    guarantee: str
    options: str
    round: int | None
    status: str
    detail: str
    sites: int | None
    nodes: tuple[int | None, int | None]
    bytes: tuple[int | None, int | None]
    seconds: float
    verification: str
    examples: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LeftGroup:
    """Sites that one pass left alone for one reason.

    Attributes:
        name: The pass.
        reason: The reason; where only numbers or quoted names differ between the sites, that of the first one.
        varies: Whether the sites' reasons differ in numbers or names.
        sites: (node, operator, reason) of each site.
    """

    name: str
    reason: str
    varies: bool
    sites: tuple[tuple[str, str, str], ...]


CACHE = "Cache a token"


def sizes(report: Data) -> list[SizeRow]:
    """Nodes, parameters, bytes of weights, FLOPs, bytes of files and of a decoder's cache a token, before and after."""
    before, after = report.get("before") or {}, report.get("after") or {}
    files = tuple((report.get(side) or {}).get("bytes") for side in ("source", "output"))
    figures = [
        ("Nodes", before.get("nodes"), after.get("nodes"), units.count),
        ("Parameters", before.get("parameters"), after.get("parameters"), units.count),
        ("Weight bytes", before.get("weight_bytes"), after.get("weight_bytes"), units.size),
        ("FLOPs", before.get("flops"), after.get("flops"), units.count),
        ("File bytes", files[0], files[1], units.size),
    ]
    if before.get("cache_bytes") or after.get("cache_bytes"):
        figures.append((CACHE, before.get("cache_bytes"), after.get("cache_bytes"), units.size))
    rows = [
        SizeRow(label, show(b), show(a), units.change(b, a), (b, a))
        for label, first, last, show in figures
        for b, a in [(_number(first), _number(last))]
    ]
    unknown = [bool(side.get("unknown_flops")) for side in (before, after)]
    if any(unknown):
        # Nodes of unknown shape aren't counted, and a pass may make a shape known: that is no change of the work.
        rows = [_at_least(row, unknown) if row.label == "FLOPs" else row for row in rows]
    return rows


def _at_least(row: SizeRow, unknown: Sequence[bool]) -> SizeRow:
    texts = [f"over {text}" if lacks else text for text, lacks in zip((row.before, row.after), unknown, strict=True)]
    return dataclasses.replace(row, before=texts[0], after=texts[1], change="")


def headline(report: Data) -> str:
    """What came of it, in one sentence without a full stop."""
    rows = {row.label: row for row in sizes(report)}
    nodes = rows["Nodes"]
    parts = [f"{nodes.before} {units.ARROW} {nodes.after} nodes"]
    for label, noun in (("File bytes", "on disk"), ("Weight bytes", "of weights")):
        row = rows[label]
        before, after = row.numbers
        if before and after is not None and abs(after / before - 1) >= 0.01:
            parts.append(f"{row.before} {units.ARROW} {row.after} {noun}")
            break
    if (cache := rows.get(CACHE)) is not None and cache.before != cache.after:
        parts.append(f"{cache.before} {units.ARROW} {cache.after} of cache a token")
    if speed := measured.speed(report.get("timing")):
        parts.append(speed)
    if quality := quality_headline(report.get("quality")):
        parts.append(quality)
    if missed_floors(report.get("quality")):
        parts.append("a floor was missed and nothing written")
    verdict = report.get("verification")
    if verdict:
        loss = f" but for the loss of {' and '.join(names)}" if (names := lossy(report)) else ""
        parts.append(measured.verdict_sentence(verdict) + loss)
    elif modified(report):
        parts.append("not verified")
    if limits := valid_only_for(report):
        parts.append(f"valid only for {', '.join(c.assumption for c in limits)}")
    taken_back = [e for e in effects(report) if e.status == "rolled back"]
    if taken_back:
        parts.append(f"{units.plural(len(taken_back), 'pass', 'passes')} rolled back")
    if not modified(report) and not taken_back:
        return f"Nothing to change: {nodes.after} nodes stay as they are"
    return ", ".join(parts)


def lossy(report: Data) -> list[str]:
    """The lossy passes that changed the model: what came after them is compared with their result."""
    return list(dict.fromkeys(e.name for e in effects(report) if e.status == "applied" and e.guarantee == "lossy"))


def modified(report: Data) -> bool:
    """Whether any pass changed something."""
    return any(e.status == "applied" for e in effects(report))


def effects(report: Data) -> list[Effect]:
    """Every run of a pass in order."""
    return [_effect(record) for record in report.get("passes") or []]


def quiet(report: Data) -> str:
    """The runs that changed nothing, in one sentence; "" where there are none."""
    runs = [e for e in effects(report) if e.status == "unchanged"]
    if not runs:
        return ""
    passes = len({e.name for e in runs})
    took = units.seconds(sum(e.seconds for e in runs))
    return f"{units.plural(len(runs), 'run')} of {units.plural(passes, 'pass', 'passes')} changed nothing ({took})."


def searched(report: Data) -> list[str]:
    """What searches for what is missed least chose: the loss that they expect, and each change where there are few."""
    found = []
    for record in report.get("passes") or []:
        options = record.get("options") or {}
        told = options.get("expected_divergence")
        expected = _number(told[-1] if isinstance(told, list) and told else told)
        surprise = _number(options.get("expected_log_perplexity_increase"))
        if record.get("status") != "applied" or (expected is None and surprise is None):
            continue
        loss = f"perplexity {math.expm1(min(surprise, 99)):+.2%}" if surprise is not None else f"loss {expected:.3g}"
        sites = [site for site in record.get("sites") or [] if site.get("outcome") == "applied"]
        found.append(f"{record.get('name')}: expected {loss}, by trials on the calibration data")
        if len(sites) <= FEW:
            found += [f"{record.get('name')}: {site.get('detail')}" for site in sites]
    return found


def left_groups(report: Data) -> list[LeftGroup]:
    """What was left alone, grouped by pass and reason, the largest groups first."""
    return group_left(report.get("left_alone") or [])


def group_left(sites: Sequence[Data]) -> list[LeftGroup]:
    """Group sites (`pass`, `node`, `op_type`, `detail`) by pass and by reason up to numbers and quoted names."""
    groups: dict[tuple[str, str], list[tuple[str, str, str]]] = defaultdict(list)
    for site in sites:
        detail = str(site.get("detail") or "no reason given")
        key = (str(site.get("pass") or "?"), _VARYING.sub("#", detail))
        groups[key].append((str(site.get("node") or ""), str(site.get("op_type") or "?"), detail))
    found = [
        LeftGroup(name, members[0][2], len({m[2] for m in members}) > 1, tuple(members))
        for (name, _), members in groups.items()
    ]
    return sorted(found, key=lambda g: (-len(g.sites), g.name, g.reason))


def operators(report: Data) -> list[tuple[str, int, int]]:
    """(operator, nodes before, nodes after): those that changed first, each part by number of nodes."""
    rows = [(str(op), int(b), int(a)) for op, (b, a) in (report.get("operators") or {}).items()]
    return sorted(rows, key=lambda row: (row[1] == row[2], -max(row[1], row[2]), row[0]))


def recipe_yaml(report: Data) -> str:
    """The full recipe as YAML."""
    import yaml

    recipe = report.get("recipe") or {}
    data = {"passes": list(recipe.get("passes") or [])}
    if assume := recipe.get("assume"):
        data["assume"] = list(assume)
    return str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100))


@dataclasses.dataclass(frozen=True)
class Condition:
    """One assumption that a result is valid only for.

    Attributes:
        assumption: Its name.
        meaning: Where it holds, as a clause.
        reasons: Why each pass needs it, as "pass: reason".
        inputs: The inputs that show whether it holds.
    """

    assumption: str
    meaning: str
    reasons: tuple[str, ...]
    inputs: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """All of it in words."""
        shown = f" (input {', '.join(map(repr, self.inputs))})" if self.inputs else ""
        needed = f"; needed by {'; '.join(self.reasons)}" if self.reasons else ""
        return f"{self.assumption}: {self.meaning}{shown}{needed}"


def conditions(entries: Sequence[Data]) -> list[Condition]:
    """What a result is valid only for, each assumption once."""
    groups: dict[str, list[Data]] = defaultdict(list)
    for entry in entries:
        groups[str(entry.get("assumption") or "?")].append(entry)
    return [
        Condition(
            assumption,
            str(members[0].get("meaning") or ""),
            tuple(dict.fromkeys(f"{m.get('pass') or '?'}: {m.get('reason') or 'no reason given'}" for m in members)),
            tuple(dict.fromkeys(str(n) for m in members for n in (m.get("inputs") or {}).values())),
        )
        for assumption, members in groups.items()
    ]


def valid_only_for(report: Data) -> list[Condition]:
    """What the result of a run is valid only for."""
    return conditions((report.get("assumptions") or {}).get("relied") or [])


def not_needed(report: Data) -> str:
    """The assumptions that no pass relied on, in a sentence; "" where there are none."""
    names = [str(n) for n in (report.get("assumptions") or {}).get("unneeded") or []]
    return f"Given but not needed: {', '.join(names)}." if names else ""


def followed(report: Data) -> str:
    """What lowering went by: a target profile, or the safe defaults."""
    profile = report.get("profile")
    if not isinstance(profile, Mapping):
        return "the safe defaults, no target profile"
    return f"target profile {profile.get('id')} ({profile.get('description')})"


def calibrated(report: Data) -> str:
    """What the passes were calibrated with; "" where it was nothing."""
    data = report.get("calibration")
    if not isinstance(data, Mapping):
        return ""
    return f"{data.get('data')} (fingerprint {data.get('fingerprint')})"


def command(report: Data) -> str:
    """The command line that makes the result again."""
    import shlex

    source = (report.get("source") or {}).get("path") or "MODEL"
    output = (report.get("output") or {}).get("path") or "OUT"
    recipe = (report.get("recipe") or {}).get("name") or "exact"
    parts = ["graphopt", "optimize", str(source), "-o", str(output), "--recipe", str(recipe)]
    parts += ["--target", str(report.get("target") or "cpu"), "--seed", str(report.get("seed") or 0)]
    parts += [str(part) for part in report.get("arguments") or []]
    return " ".join(shlex.quote(part) for part in parts)


def _number(figure: object) -> float | None:
    return figure if isinstance(figure, (int, float)) else None


def _effect(record: Data) -> Effect:
    before, after = record.get("before") or {}, record.get("after") or {}
    applied = [s for s in record.get("sites") or [] if s.get("outcome") == "applied"]
    changed = record.get("status") == "applied"
    verdict = record.get("verdict")
    return Effect(
        name=str(record.get("name") or "?"),
        family=str(record.get("family") or "other"),
        guarantee=str(record.get("guarantee") or "unstated"),
        options=_options(record.get("options") or {}),
        round=record.get("round"),
        status=str(record.get("status") or "unchanged"),
        detail=str(record.get("detail") or ""),
        sites=len(applied) if applied or not changed else None,
        nodes=(before.get("nodes"), after.get("nodes")),
        bytes=(before.get("weight_bytes"), after.get("weight_bytes")),
        seconds=float(record.get("seconds") or 0.0),
        verification=measured.short_verdict(verdict) if verdict else "",
        examples=tuple(f"{s.get('op_type')} {s.get('node')}: {s.get('detail')}" for s in applied),
    )


def _options(options: Data) -> str:
    return ", ".join(f"{name}: {value}" for name, value in options.items() if name != "frontier")


def checks(report: Data) -> list[tuple[str, str]]:
    """The state of the result as (good, warn or bad; words): what a reader must know before trusting it."""
    found = [("bad", f"Floor missed: {sentence}") for sentence in missed_floors(report.get("quality"))]
    verdict = report.get("verification")
    if verdict and verdict.get("ok"):
        found.append(("good", "Verified but for lossy passes" if lossy(report) else "Verified against the original"))
    elif verdict:
        found.append(("bad", "Verification failed"))
    elif modified(report):
        found.append(("warn", "Not verified"))
    if limits := valid_only_for(report):
        found.append(("warn", f"Valid only for {', '.join(c.assumption for c in limits)}"))
    taken_back = {e.name for e in effects(report) if e.status == "rolled back"}
    for name in sorted(taken_back):
        found.append(("bad", f"{name} rolled back"))
    if lossy(report):
        found.append(("warn", "Lossy passes ran: the numbers were meant to change"))
    elif modified(report) and not taken_back:
        found.append(("good", "Every pass that ran is exact"))
    return found
