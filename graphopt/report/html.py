"""The report as one HTML file that needs nothing else: no network, no fonts, no library; readable without scripts."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Mapping
from typing import Any

from graphopt.graph import session_code
from graphopt.report import measured, summary, units
from graphopt.report.markup import Cell, bars, code_block, definitions, details, label, name, number, table, text
from graphopt.report.pareto import Point, pareto_svg
from graphopt.report.quality_section import quality_section
from graphopt.report.step_lines import step_table
from graphopt.report.summary import Effect

Data = Mapping[str, Any]

SHOWN_ROWS = 12
"""Rows of a long table that are shown at once; the others open on a click."""

MODES = {"all": "all optimizations", "none": "none"}
"""Modes of ONNX Runtime in words."""


def render_html(report: Data) -> str:
    """The report as one self-contained HTML document.

    Args:
        report: What `Report.to_dict()` gives; parts may be missing or None.
    """
    sections = [
        ("sizes", "Before and after", _sizes(report)),
        ("valid", "Valid only for", _conditions(report)),
        ("quality", "Quality", quality_section(report)),
        ("steps", "Step by step", _steps(report)),
        ("speed", "Speed", _timing(report.get("timing"))),
        ("choices", "Size and expected loss", _choices(report)),
        ("verification", "Verification", _verification(report)),
        ("passes", "Passes", _passes(report)),
        ("operators", "Operators", _operators(report)),
        ("left", "Left alone, and why", _left(report)),
        ("session", "Session settings", _session(report)),
        ("again", "Make it again", _reproduce(report)),
    ]
    shown = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{text(title)}</a>' for key, title, _ in shown)
    body = "".join(f'<section aria-labelledby="{k}"><h2 id="{k}">{text(t)}</h2>{b}</section>' for k, t, b in shown)
    title = f"graphopt report: {_file(report, 'source')}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta name="generator" content="graphopt {text(report.get("graphopt") or "")}">\n'
        f"<title>{text(title)}</title>\n<style>\n{_asset('report.css')}</style>\n</head>\n<body>\n"
        f'<header>{_header(report)}<nav aria-label="Sections">{links}</nav></header>\n<main>\n{body}\n</main>\n'
        f"<footer>{_footer(report)}</footer>\n<script>\n{_asset('report.js')}</script>\n</body>\n</html>\n"
    )


def _asset(file: str) -> str:
    return importlib.resources.files("graphopt.report").joinpath(file).read_text(encoding="utf-8")


def _file(report: Data, side: str) -> str:
    return str((report.get(side) or {}).get("path") or ("a model in memory" if side == "source" else "not saved"))


def _header(report: Data) -> str:
    sentence = summary.headline(report)
    checks = "".join(f'<li class="{kind}">{text(words)}</li>' for kind, words in summary.checks(report))
    return (
        f'<p class="brand">graphopt {text(report.get("graphopt") or "")} · report</p><h1>{text(sentence)}</h1>'
        f"<p>{name(_file(report, 'source'))} → {name(_file(report, 'output'))}</p>"
        f'<ul class="verdict">{checks}</ul>'
    )


# ---- sections


def _sizes(report: Data) -> str:
    rows = []
    for row in summary.sizes(report):
        before, after = row.numbers
        larger = before is not None and after is not None and after > before
        rows.append(
            [label(row.label), number(row.before), number(row.after), number(row.change, kind="warn" if larger else "")]
        )
    about = (
        '<p class="soft">Nodes include those of subgraphs; parameters and weight bytes are those in use. FLOPs of one '
        "inference; <code>graphopt inspect</code> says at which sizes.</p>"
    )
    took = [f"Passes {units.seconds(report.get('seconds'))}"]
    if report.get("verification"):
        took.append(f"verification {units.seconds(report.get('verify_seconds'))}")
    return (
        table("Size of the model", ["", "before", "after", "change"], rows, sortable=False, kind="compact")
        + about
        + "".join(f"<p>{text(str(note))}</p>" for note in report.get("notes") or [])
        + f"<p>{text(', '.join(took))}.</p>"
    )


def _conditions(report: Data) -> str:
    rows = [
        [
            label(c.assumption, code=True),
            label(c.meaning),
            label(", ".join(c.inputs), code=True),
            label("; ".join(c.reasons)),
        ]
        for c in summary.valid_only_for(report)
    ]
    unneeded = summary.not_needed(report)
    note = f'<p class="soft">{text(unneeded)}</p>' if unneeded else ""
    if not rows:
        return f"<p>The result takes every input that the original takes.</p>{note}" if note else ""
    top = (
        "<p>The result is right where these hold, and was compared there only. <code>graphopt.session</code> refuses "
        "other inputs; to run such, optimize the model again without assuming it.</p>"
    )
    headers = ["assumption", "holds where", "inputs that show it", "needed by"]
    return top + table("What the result takes for granted", headers, rows, sortable=False) + note


def _steps(report: Data) -> str:
    headers, rows = step_table(report.get("steps"))
    if not rows:
        return ""
    cells = [[label(row[0], code=row[0] != rows[0][0]), *(number(cell) for cell in row[1:])] for row in rows]
    return table("What each lossy pass gives and costs, without those behind it", headers, cells, sortable=False)


def _choices(report: Data) -> str:
    """A plot for each pass that chose among allocations."""
    parts = []
    for record in report.get("passes") or []:
        found = (record.get("options") or {}).get("frontier") or []
        if record.get("status") != "applied" or not found or not all(loss > 0 for _, loss in found):
            continue
        points = [
            Point(f"{cost / 1e6:.3g} MB", "the best for their bytes", cost / 1e6, loss) for cost, loss in found[:-1]
        ]
        points.append(Point("chosen", "chosen", found[-1][0] / 1e6, found[-1][1]))
        parts.append(f"<p>{name(str(record.get('name')))}: what other budgets would be expected to lose.</p>")
        parts.append(pareto_svg(points, "MB of weights", "expected loss, nats"))
    return "".join(parts)


def _timing(timing: Data | None) -> str:
    rows = measured.timing_rows(timing)
    if not rows:
        return ""
    most = max(row.cpu or 0.0 for row in rows) or 1.0
    fills = {"reference": "before", "control": "before"}
    cells = [
        [
            label(row.label, code=True),
            number(units.seconds(row.cpu), row.cpu),
            number(units.ratio(row.ratio), row.ratio),
            number(row.interval, kind="minor"),
            number(units.seconds(row.wall), row.wall),
            number(units.ratio(row.wall_ratio), row.wall_ratio),
            number(units.seconds(row.load), row.load, kind="minor"),
            bars([((row.cpu or 0.0) / most, fills.get(row.kind, "after"))]),
        ]
        for row in rows
    ]
    headers = ["model", "CPU time", "ratio", "range", "wall time", "ratio", "load", "CPU time"]
    caption = "Median time of one inference; ratios to the original"
    notes = "".join(f'<p class="soft">{text(line)}</p>' for line in measured.timing_notes(timing))
    found = table(caption, headers, cells, sortable=False, kind="wide-first") + notes
    if generation := (timing or {}).get("generation"):
        headers, texts = measured.generation_table(generation)
        cells = [[label(row[0], code=True), label(row[1]), *map(number, row[2:])] for row in texts]
        found += table("A decoder reading and writing", headers, cells, sortable=False, kind="wide-first")
        found += f'<p class="soft">{text(measured.generation_note(generation))}</p>'
    return found


def _verification(report: Data) -> str:
    verdict = report.get("verification")
    if not verdict:
        why = (
            "The result was not compared with the original"
            if summary.modified(report)
            else "Nothing changed, so nothing was compared"
        )
        return f"<p>{text(why)}.</p>"
    found = measured.margins(verdict)
    worst = measured.worst_by_output(found)
    sentence = _capital(measured.verdict_sentence(verdict))
    parts = [f"<p><strong>{text(sentence)}.</strong> {text(measured.method(verdict))}</p>"]
    parts += [f'<p class="bad-text">{text(failure)}</p>' for failure in measured.failures(verdict)]
    parts += [f'<p class="soft">{text(note)}</p>' for note in measured.notes(verdict)]
    if found:
        caption = "Worst case of each output; the bar is the error, its right end the tolerance"
        parts.append(_margin_table(caption, worst[:SHOWN_ROWS]))
        if len(worst) > SHOWN_ROWS:
            rest = _margin_table("The other outputs", worst[SHOWN_ROWS:])
            parts.append(details(f"{units.count(len(worst) - SHOWN_ROWS)} more outputs", rest))
        if len(found) > len(worst):
            every = _margin_table("Every output on every probe in every mode, worst first", found)
            parts.append(details(f"All {units.count(len(found))} comparisons", every))
    probes = [
        [label(str(p.get("name", "")), code=True), label(str(p.get("description", "")))]
        for p in report.get("probes") or []
    ]
    if probes:
        parts.append(
            details(
                f"{units.plural(len(probes), 'probe')} used", table("Probe inputs", ["probe", "what it feeds"], probes)
            )
        )
    skipped = [
        [label(str(p.get("name", "")), code=True), label(str(p.get("reason", "")))]
        for p in report.get("skipped_probes") or []
    ]
    if skipped:
        shown = table("Probe inputs that the original itself doesn't run on", ["probe", "reason"], skipped)
        parts.append(
            details(f"{units.plural(len(skipped), 'probe')} left out: the original doesn't run on them", shown)
        )
    return "".join(parts)


def _margin_table(caption: str, margins: list[measured.Margin]) -> str:
    rows, kinds = [], []
    for m in margins:
        share = 1.0 if m.used is None else m.used
        kind = "bad" if not m.ok else "warn" if share > 0.5 else "good"
        what = label(m.output, code=True)
        if m.note:
            what = Cell(f'{what.html}<br><span class="bad-text">{text(m.note)}</span>', what.key)
        rows.append([
            what,
            label(m.probe, code=True, kind="minor"),
            label(MODES.get(m.mode, m.mode), kind="minor"),
            number(units.error(m.error), m.error),
            number(measured.used_words(m), share if m.used is not None else 1e9),
            bars([(share, kind)], limit=True),
        ])  # fmt: skip
        kinds.append("" if m.ok else "bad")
    headers = ["output", "probe", "ORT optimizations", "largest error", "of tolerance", "margin"]
    return table(caption, headers, rows, row_kinds=kinds)


def _passes(report: Data) -> str:
    found = summary.effects(report)
    if not found:
        return ""
    told = [e for e in found if e.status != "unchanged"]
    still = [e for e in found if e.status == "unchanged"]
    parts = []
    if told:
        slowest = max(e.seconds for e in found) or 1.0
        parts.append(
            table(
                f"Passes that did something, in order; check: {measured.SHORT_KEY}",
                ["pass", "round", "sites", "nodes", "weight bytes", "check", "time", ""],
                [_effect_row(e, slowest) for e in told],
                row_kinds=["bad" if e.status == "rolled back" else "" for e in told],
                kind="wide-first",
            )
        )
        examples = "".join(_examples(e) for e in told if e.examples)
        if examples:
            parts.append(details("What was done at each site", examples))
    if still:
        rows = [
            [label(e.name, code=True), number(str(e.round or "")), number(units.seconds(e.seconds), e.seconds)]
            for e in still
        ]
        parts.append(
            details(
                text(summary.quiet(report)),
                table("Runs that changed nothing", ["pass", "round", "time"], rows, kind="compact"),
            )
        )
    return "".join(parts)


def _effect_row(e: Effect, slowest: float) -> list[Cell]:
    title = name(e.name)
    if e.options:
        title += f' <span class="soft">{text(e.options)}</span>'
    if e.guarantee == "lossy":
        title += ' <span class="soft">(lossy)</span>'
    if e.status in ("rolled back", "skipped"):
        words = f"{_capital(e.status)}: {e.detail}" if e.detail else _capital(e.status)
        title += f'<br><span class="{"bad-text" if e.status == "rolled back" else "soft"}">{text(words)}.</span>'
    kept = e.status == "applied"
    return [
        Cell(title, e.name),
        number(str(e.round or ""), e.round),
        number(units.count(e.sites) if kept else "", e.sites),
        number(f"{units.count(e.nodes[0])} → {units.count(e.nodes[1])}" if kept else "", e.nodes[1]),
        number(units.difference(*e.bytes, in_bytes=True) if kept else "", (e.bytes[1] or 0) - (e.bytes[0] or 0)),
        number(e.verification, kind="soft" if not e.verification else ""),
        number(units.seconds(e.seconds), e.seconds),
        bars([(e.seconds / slowest, "after" if kept else "before")]),
    ]


def _examples(e: Effect) -> str:
    items = "".join(f"<li>{text(line)}</li>" for line in e.examples)
    count = f'<span class="count">{units.count(len(e.examples))}</span>'
    summary_html = f'{count}<span>{name(e.name)}</span><span class="soft">round {text(e.round)}</span>'
    return details(summary_html, f"<ul>{items}</ul>", kind="group")


def _operators(report: Data) -> str:
    rows = summary.operators(report)
    if not rows:
        return ""
    most = max(max(before, after) for _, before, after in rows) or 1
    changed = [row for row in rows if row[1] != row[2]]
    same = [row for row in rows if row[1] == row[2]]
    key = '<p class="soft"><span class="key before"></span>before<span class="key after"></span>after</p>'
    parts = [key + _operator_table("Number of nodes of each operator that changed", changed, most)] if changed else []
    if same:
        nodes = sum(after for _, _, after in same)
        words = f"{units.plural(len(same), 'operator')} with {units.plural(nodes, 'node')} as before"
        parts.append(
            details(words, _operator_table("Operators with as many nodes as before", same, most), open_=not changed)
        )
    return "".join(parts)


def _operator_table(caption: str, rows: list[tuple[str, int, int]], most: int) -> str:
    cells = [
        [
            label(op, code=True),
            number(units.count(before), before),
            number(units.count(after), after),
            number(units.difference(before, after), after - before),
            bars([(before / most, "before"), (after / most, "after")]),
        ]
        for op, before, after in rows
    ]
    return table(caption, ["operator", "before", "after", "change", ""], cells)


def _left(report: Data) -> str:
    groups = summary.left_groups(report)
    if not groups:
        return ""
    total = sum(len(g.sites) for g in groups)
    parts = []
    for group in groups:
        node, op, _ = group.sites[0]
        varies = " (numbers and names vary)" if group.varies else ""
        head = (
            f'<span class="count">{units.count(len(group.sites))}</span><span>{name(group.name)}</span>'
            f'<span class="reason">{text(_capital(group.reason))}<span class="soft">{varies}</span></span>'
            f'<span class="example">e.g. {text(op)} {name(node)}</span>'
        )
        items = "".join(
            f"<li>{text(op)} {name(node)}{f': {text(detail)}' if group.varies else ''}</li>"
            for node, op, detail in group.sites
        )
        found = text(f"{group.name} {group.reason}".lower())
        parts.append(f'<details class="group" data-text="{found}"><summary>{head}</summary><ul>{items}</ul></details>')
    intro = (
        f"{units.plural(total, 'site')} looked like something a pass improves, but a condition was missing. "
        "Each has its reason; what you change in the model or its export to meet it, the next run picks up."
    )
    box = (
        f'<div class="filter" data-total="{total}" hidden><label for="left-filter">Filter</label>'
        '<input type="search" id="left-filter" aria-controls="left-groups" '
        'placeholder="pass, reason, operator or node">'
        '<output for="left-filter"></output></div>'
    )
    return f'<p>{text(intro)}</p>{box}<div id="left-groups">{"".join(parts)}</div>'


def _session(report: Data) -> str:
    settings = report.get("session_settings") or []
    model = _file(report, "output") if report.get("output") else "model.onnx"
    if settings:
        rows = [
            [
                label(str(s.get("setting", "")), code=True),
                label(str(s.get("value", "")), code=True),
                label(str(s.get("reason", ""))),
            ]
            for s in settings
        ]
        top = "<p>The file can't carry these; set them in the session that runs it.</p>"
        top += table("Settings of the ONNX Runtime session", ["setting", "value", "why"], rows)
    else:
        top = "<p>The model needs no particular session settings.</p>"
    lines = (
        f"import graphopt\n\nsession = graphopt.session({json.dumps(model, ensure_ascii=False)})  # sets all of this"
    )
    if settings:
        lines += f"\n\n# the same without graphopt\n{session_code.python_lines(settings, model)}"
    python = code_block("Python", lines)
    cpp = code_block("C++", session_code.cpp_lines(settings, model))
    return f'{top}<div class="columns"><div>{python}</div><div>{cpp}</div></div>'


def _reproduce(report: Data) -> str:
    libraries = report.get("libraries") or {}
    platform = report.get("platform") or {}
    pairs = [("graphopt", str(report.get("graphopt") or "–")), *((str(k), str(v)) for k, v in libraries.items())]
    if platform:
        machine = " ".join(str(platform.get(k, "")) for k in ("system", "machine")).strip()
        pairs += [("Python", str(platform.get("python", "–"))), ("platform", machine)]
    pairs.append(("lowered by", summary.followed(report)))
    if data := summary.calibrated(report):
        pairs.append(("calibrated on", data))
    recipe = str((report.get("recipe") or {}).get("name") or "recipe")
    return (
        code_block("Command", summary.command(report))
        + code_block(f"Recipe “{recipe}” in full", summary.recipe_yaml(report))
        + "<h3>Versions</h3>"
        + definitions(pairs)
    )


def _footer(report: Data) -> str:
    return text(
        f"Written by graphopt {report.get('graphopt') or ''}. Same input, recipe, seed and versions: same output."
    )


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
