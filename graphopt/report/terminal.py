"""Reports for the terminal: readable at 80 columns, in black and white, and where only ASCII can be printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

from graphopt.report import measured, summary, units
from graphopt.report.printer import Printer
from graphopt.report.quality_lines import HEADERS, missed_floors, quality_notes, quality_rows
from graphopt.report.step_lines import step_table
from graphopt.report.structure_lines import structure_lines
from graphopt.report.summary import Condition, Effect, LeftGroup

Data = Mapping[str, Any]

TOP_GROUPS = 10
"""Reasons for leaving sites alone that are printed."""
TOP_ROWS = 12
"""Rows of other long tables that are printed."""


def print_report(report: Data, console: Console) -> None:
    """Print what `Report.to_dict()` holds."""
    printer = Printer(console)
    printer.title(summary.headline(report))
    source, output = (report.get("source") or {}).get("path"), (report.get("output") or {}).get("path")
    if source or output:
        printer.line(f"{source or 'a model in memory'} → {output or 'not saved'}", style="dim")
    printer.table(
        ["", "before", "after", "change"],
        [[row.label, row.before, row.after, row.change] for row in summary.sizes(report)],
        right=(1, 2, 3),
    )
    for note in report.get("notes") or []:
        printer.line(str(note), style="yellow")
    _print_conditions(summary.valid_only_for(report), printer)
    if sentence := summary.not_needed(report):
        printer.line(sentence)
    _print_passes(report, printer)
    if chosen := summary.searched(report):
        printer.heading("Chosen by a search")
        _print_notes(chosen, printer)
    _print_verification(report, printer)
    if report.get("quality"):
        printer.heading("Quality, size and speed" if report.get("timing") else "Quality and size")
        _print_quality_body(report.get("quality"), report.get("timing"), printer)
    headers, rows = step_table(report.get("steps"))
    if rows:
        printer.heading("Step by step: what each lossy pass gives and costs")
        printer.table(headers, rows, right=range(1, len(headers)))
    if report.get("timing"):
        printer.heading("Speed")
        _print_timing_body(report["timing"], printer)
        if generation := report["timing"].get("generation"):
            _print_generation_body(generation, printer)
    _print_left(summary.left_groups(report), printer)
    _print_settings(report, printer)
    if renamed := report.get("renamed"):
        printer.heading(f"Renamed: {units.plural(len(renamed), 'input or output', 'inputs and outputs')}")
        shown = [f"{before} → {now}" for before, now in list(renamed.items())[:3]]
        printer.line(", ".join(shown) + (", ... (--json has all)" if len(renamed) > len(shown) else ""))
    printer.line()
    took = f"Passes {units.seconds(report.get('seconds'))}"
    if report.get("verification"):
        took += f", verification {units.seconds(report.get('verify_seconds'))}"
    printer.line(f"{took}.", style="dim")
    printer.line(f"Lowered by {summary.followed(report)}.", style="dim")
    if data := summary.calibrated(report):
        printer.line(f"Calibrated on {data}.", style="dim")


def print_inspection(data: Data, console: Console) -> None:
    """Print what `graphopt.inspect` gives."""
    printer = Printer(console)
    printer.title(str(data.get("path") or "a model in memory"))
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in (data.get("opsets") or {}).items())
    facts = [f"IR {data.get('ir_version', units.MISSING)}", f"opset {opsets or units.MISSING}"]
    if producer := data.get("producer"):
        facts.append(f"by {producer}")
    if (size := data.get("bytes")) is not None:
        facts.append(f"{units.size(size)} on disk" + (" with external data" if data.get("external_data") else ""))
    printer.line(", ".join(facts), style="dim")
    problems = data.get("problems") or []
    if problems:
        printer.heading(units.plural(len(problems), "problem"), style="bold red")
        for problem in problems[:TOP_ROWS]:
            printer.bullet(str(problem))
        printer.more(len(problems) - TOP_ROWS, "--json has all")
    printer.line()
    weights = f"{units.count(data.get('parameters'))} parameters, {units.size(data.get('weight_bytes'))} of weights"
    printer.line(
        f"{units.count(data.get('nodes'))} nodes, {weights}, {units.count(data.get('flops'))} FLOPs{_bound(data)}"
    )
    _print_conditions(summary.conditions(data.get("assumptions") or []), printer)
    for title, key in (("Inputs", "inputs"), ("Inputs with a default", "overridable"), ("Outputs", "outputs")):
        values = data.get(key) or []
        if values:
            printer.heading(title)
            rows = [[str(v.get("name")), str(v.get("dtype") or "?"), _shape(v.get("shape"))] for v in values[:TOP_ROWS]]
            printer.table(["name", "type", "shape"], rows)
            printer.more(len(values) - TOP_ROWS, "--json has all")
    _print_counts("Operators", data.get("operators") or {}, printer)
    _print_counts("Structures found", data.get("structures") or {}, printer)
    if layers := data.get("layers") or []:
        printer.heading("Layers found")
        for stack in layers:
            weights = stack["weights"]
            more = f" and {len(weights) - TOP_ROWS} more" if len(weights) > TOP_ROWS else ""
            printer.line(f"{stack['count']} × [{', '.join(weights[:TOP_ROWS])}{more}]")
        for tied in data.get("tied_layers") or []:
            shared, stack = tied["layers"], layers[tied["stack"]]
            which = (
                "all" if len(shared) == stack["count"] else ", ".join(str(number + 1) for number in shared[:TOP_ROWS])
            )
            printer.bullet(f"{which} of the {stack['count']} layers share their weights")
    if lines := structure_lines(data):
        printer.heading("Structure")
        for line in lines:
            printer.line(line)
    functions = [str(f) for f in data.get("functions") or []]
    if functions:
        printer.heading("Functions")
        printer.line(", ".join(functions[:TOP_ROWS]))
        printer.more(len(functions) - TOP_ROWS, "--json has all")
    why = data.get("why")
    if why is not None:
        _print_left(summary.group_left(why), printer, everything="--json has all")
        if not why:
            printer.heading("Left alone, and why")
            printer.line("Nothing: the exact passes left no site alone.")


def print_verdict(data: Data, console: Console) -> None:
    """Print what `Verdict.to_dict()` holds."""
    printer = Printer(console)
    printer.line(_capital(measured.verdict_sentence(data)) + ".", style="bold green" if data.get("ok") else "bold red")
    for failure in measured.failures(data)[1:]:
        printer.bullet(failure, style="red")
    if how := measured.method(data):
        printer.line(how, style="dim")
    _print_notes(measured.notes(data), printer)
    found = measured.margins(data)
    shown = [m for m in found if not m.ok] or measured.worst_by_output(found)
    if not shown:
        return
    rows = [[m.output, m.probe, _mode(m.mode), units.error(m.error), measured.used_words(m)] for m in shown[:TOP_ROWS]]
    headers = ["output", "probe", "ORT optim.", "error", "of tolerance"]
    printer.table(headers, rows, right=(3, 4), styles=["" if m.ok else "red" for m in shown])
    printer.more(len(shown) - TOP_ROWS, "--json has all")
    for m in [m for m in shown if m.note][:TOP_ROWS]:
        printer.bullet(f"{m.output} on {m.probe}: {m.note}", style="red")


def print_quality(data: Data, console: Console) -> None:
    """Print what `graphopt verify --quality` measured."""
    _print_quality_body(data, None, Printer(console))


def print_timing(data: Data, console: Console) -> None:
    """Print what `BenchResult.to_dict()` holds."""
    _print_timing_body(data, Printer(console))


def print_generation(data: Data, console: Console) -> None:
    """Print what `graphopt bench --generate` measured."""
    printer = Printer(console)
    _print_generation_body(data, printer)
    names = [row.label for row in measured.timing_rows(data)]
    for name, found in zip(names, data.get("perplexity") or [], strict=False):
        windows = f"{units.plural(found['windows'], 'window')} of {found['window']} tokens"
        printer.line(f"{name}: perplexity {found['value']:.4f} over {found['tokens']:,} tokens in {windows}")


# ---- parts


def _print_generation_body(data: Data, printer: Printer) -> None:
    headers, rows = measured.generation_table(data)
    printer.table(headers, rows, right=(2, 3, 4, 5, 6, 7))
    printer.line(measured.generation_note(data), style="dim")


def _print_conditions(conditions: Sequence[Condition], printer: Printer) -> None:
    if conditions:
        printer.heading("Valid only for (graphopt.session checks it)")
        for condition in conditions:
            printer.bullet(condition.sentence)


def _print_passes(report: Data, printer: Printer) -> None:
    found = summary.effects(report)
    if not found:
        return
    applied = [e for e in found if e.status == "applied"]
    printer.heading("Passes")
    if applied:
        printer.table(
            ["pass", "rd", "sites", "nodes", "weights", "time", "check"],
            [_effect_row(e) for e in applied],
            right=(1, 2, 3, 4, 5, 6),
        )
        if any(e.verification for e in applied):
            printer.line(f"check: {measured.SHORT_KEY}", style="dim")
    for e in found:
        if e.status == "rolled back":
            printer.bullet(f"ROLLED BACK {e.name}: {e.detail or 'no reason given'}", style="bold red")
        elif e.status == "skipped":
            printer.bullet(f"Skipped {e.name}: {e.detail or 'no reason given'}")
    if sentence := summary.quiet(report):
        printer.line(sentence, style="dim")


def _effect_row(e: Effect) -> list[str]:
    before, after = e.nodes
    nodes = units.count(after) if before == after else f"{units.count(before)} → {units.count(after)}"
    return [
        e.name,
        str(e.round or ""),
        units.count(e.sites),
        nodes,
        units.difference(*e.bytes, in_bytes=True),
        units.seconds(e.seconds),
        e.verification,
    ]


def _print_verification(report: Data, printer: Printer) -> None:
    verdict = report.get("verification")
    printer.heading("Verification")
    if not verdict:
        changed = summary.modified(report)
        printer.line("Off: the result was not compared." if changed else "Nothing changed, nothing to compare.")
        return
    printer.line(_capital(measured.verdict_sentence(verdict)) + ".", style="green" if verdict.get("ok") else "bold red")
    found = measured.margins(verdict)
    if found and found[0].used != 0:
        worst = found[0]
        where = f"{worst.output} on probe {worst.probe!r}, ORT optimizations {_mode(worst.mode)}"
        error = f", largest error {units.error(worst.error)}" if worst.error is not None else ""
        printer.line(f"Worst: {where}{error}.")
    if how := measured.method(verdict):
        printer.line(how, style="dim")
    _print_notes(measured.notes(verdict), printer)
    if skipped := report.get("skipped_probes"):
        first = skipped[0]
        probes = units.plural(len(skipped), "probe")
        printer.line(
            f"{probes} left out, as the original fails on them: {first.get('name')}: {first.get('reason')}", style="dim"
        )


def _print_quality_body(quality: Data | None, timing: Data | None, printer: Printer) -> None:
    rows = quality_rows(quality, timing)
    width = len(HEADERS) if any(row.floor for row in rows) else len(HEADERS) - 1
    styles = ["bold red" if row.missed else "" for row in rows]
    printer.table(HEADERS[:width], [row.cells[:width] for row in rows], right=(1, 2, 3), styles=styles)
    for sentence in missed_floors(quality):
        printer.bullet(f"Floor missed: {sentence}", style="bold red")
    for note in quality_notes(quality):
        printer.line(note, style="dim")


def _print_notes(notes: Sequence[str], printer: Printer) -> None:
    for note in notes[:TOP_ROWS]:
        printer.bullet(note)
    printer.more(len(notes) - TOP_ROWS, "--json has all")


def _print_left(
    groups: Sequence[LeftGroup], printer: Printer, everything: str = "--json or the HTML report has all"
) -> None:
    if not groups:
        return
    sites = sum(len(g.sites) for g in groups)
    printer.heading(f"Left alone, and why ({units.plural(sites, 'site')})")
    for group in groups[:TOP_GROUPS]:
        node, op, _ = group.sites[0]
        more = f" and {units.count(len(group.sites) - 1)} more" if len(group.sites) > 1 else ""
        printer.item(f"{units.count(len(group.sites))}×", f"{group.name}: {group.reason}", f"{op} {node!r}{more}")
    rest = groups[TOP_GROUPS:]
    if rest:
        count = sum(len(g.sites) for g in rest)
        printer.line(
            f"and {units.plural(len(rest), 'more reason')} at {units.plural(count, 'site')}: {everything}", style="dim"
        )


def _print_settings(report: Data, printer: Printer) -> None:
    settings = report.get("session_settings") or []
    if not settings:
        return
    printer.heading("Set in the session that runs it (graphopt.session does)")
    for setting in settings:
        printer.bullet(f"{setting.get('setting')} = {setting.get('value')}: {setting.get('reason')}")


def _print_timing_body(timing: Data, printer: Printer) -> None:
    rows = [
        [row.label, units.seconds(row.cpu), units.ratio(row.ratio), row.interval, units.seconds(row.wall)]
        for row in measured.timing_rows(timing)
    ]
    if rows:
        printer.table(["model", "CPU time", "ratio", "range", "wall time"], rows, right=(1, 2, 3, 4))
    for line in measured.timing_notes(timing):
        printer.line(line, style="dim")


def _print_counts(title: str, counts: Mapping[str, int], printer: Printer) -> None:
    if counts:
        printer.heading(title)
        printer.line(", ".join(f"{name} {units.count(number)}" for name, number in counts.items()))


def _bound(data: Data) -> str:
    dims = data.get("flops_dims") or {}
    # "input[axis]" stands for an axis without a name, or repeats one that has a name.
    dims = {name: size for name, size in dims.items() if "[" not in name} or dims
    at = f" at {', '.join(f'{name} = {size}' for name, size in dims.items())}" if dims else ""
    unknown = data.get("unknown_flops")
    return at + (f" (without {units.plural(unknown, 'node')} of unknown shape)" if unknown else "")


def _shape(shape: Sequence[object] | None) -> str:
    return "unknown" if shape is None else f"[{', '.join(str(d) for d in shape)}]"


def _mode(mode: str) -> str:
    return {"all": "on", "none": "off"}.get(mode, mode)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
