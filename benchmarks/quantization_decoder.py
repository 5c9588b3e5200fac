"""First part of `quantization.py`: off-grid SmolLM2 in few bits, what each method costs in quality, size and speed."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import math
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from export_smollm2 import export, load_module, save_tokenizer
from memory_limit import read_bandwidth
from quantization_peers import GENAI, LLAMA, PEERS, make_peer, scorer, system
from quantization_variants import (
    ACTIVATIONS,
    ASSUMED,
    FLOAT,
    SETTINGS,
    Kind,
    Variant,
    make,
    recipe_of,
    size,
    variants,
)

from graphopt.calibration.text import tokenize
from graphopt.errors import GraphoptError, UsageError
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.models.off_grid import off_grid
from graphopt.models.texts import wikipedia
from graphopt.recipe import load as load_recipe
from graphopt.report.pareto import Point, pareto_svg
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.memory_session import release_memory
from graphopt.verification.decoding_speed import benchmark_decoding
from graphopt.verification.quality.language import language_quality

WINDOW = 512
TOGETHER = 6
"""Systems that are judged or timed in one go, besides the float model."""
BESIDE_PEERS = ("gptq+decode, 4 bits, group 32", "gptq+decode, 4 bits, group 128")
"""Rows that are timed in the same rounds as the peers."""
SERIES: dict[Kind, str] = {
    "data-free": "without data", "calibrated": "calibrated", "automatic": "auto", "peer": "others", "float": FLOAT
}  # fmt: skip


@dataclasses.dataclass
class Row:
    """What was measured of a variant; None: not yet.

    Attributes:
        kind: Of its method.
        section: The heading that it stands under.
        bytes: On disk.
        perplexity: Over all windows.
        kl: Mean divergence from the float model in nats.
        top1: Share of the tokens after which the most probable one is the float model's.
        prefill: Time over the float model's, and its uncertainty.
        decode: Likewise.
        seconds: Of the making.
        peak: Bytes of memory of the making at most; 0: not known.
        missing: Why there is nothing; empty: there is.
        form: Of its graph, see `form_of`.
        timed_as: The row of the same form that was timed in its place; empty: itself.
    """

    kind: Kind = "data-free"
    section: str = ""
    bytes: int = 0
    perplexity: float | None = None
    kl: float | None = None
    top1: float | None = None
    prefill: tuple[float, float] | None = None
    decode: tuple[float, float] | None = None
    seconds: float = 0.0
    peak: int = 0
    missing: str = ""
    form: str = ""
    timed_as: str = ""


class Kept:
    """Rows by name and the float model's speeds, in a file, so that `--resume` goes on where a run ended.

    Args:
        file: The file.
        resume: Take what is there.
        given: What all rows hang on.

    Raises:
        UsageError: What is there was measured with something else.
    """

    def __init__(self, file: Path, resume: bool, given: dict[str, Any]) -> None:
        self.file, self.given = file, given
        self.rows: dict[str, Row] = {}
        self.rates: dict[str, float] = {}
        if resume and file.exists():
            data = json.loads(file.read_text())
            if data["given"] != given:
                raise UsageError(f"{file} was measured with {data['given']}, not with {given}; leave --resume out.")
            self.rates = data["rates"]
            self.rows = {name: Row(**row) for name, row in data["rows"].items()}

    def write(self) -> None:
        """Write them."""
        rows = {name: dataclasses.asdict(row) for name, row in self.rows.items()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"given": self.given, "rates": self.rates, "rows": rows}, indent=1))


@dataclasses.dataclass
class Inputs:
    """What all rows are made of and judged by: the off-grid model, graphopt's float graph of it, and the texts."""

    source: Path
    optimized: Path
    evaluation: npt.NDArray[np.int64]
    calibration: Path


def measure(options: argparse.Namespace) -> tuple[list[str], str | None]:
    """Measure what is missing; returns the lines of the tables, and the plot."""
    given = prepare(options)
    texts = hashlib.sha256(given.evaluation.tobytes() + np.load(given.calibration).tobytes()).hexdigest()[:16]
    hang_on = {"windows": options.windows, "samples": options.samples, "texts": texts}
    kept = Kept(options.work / "decoder.json", options.resume, hang_on)
    wanted = [Variant(FLOAT, "float"), *variants(options.only)]
    wanted += [v for v in PEERS if not options.only or v.method in options.only or v.name in options.only]
    files: dict[str, Path] = {}
    for variant in wanted:
        row = kept.rows.setdefault(variant.name, Row(variant.kind, variant.section))
        file = made(variant, row, given, options)
        if file is not None:
            files[variant.name], row.bytes = file, bytes_of(variant, file)
            row.form = row.form or ("" if variant.kind == "peer" else form_of(file))
        elif row.missing:
            print(f"{variant.name} is left out: {row.missing}", flush=True)
        kept.write()
    present = [v for v in wanted if v.name in files and v.kind != "float"]
    judge([v for v in present if kept.rows[v.name].kl is None], files, kept, given.evaluation, options)
    if options.rounds:
        time_all(one_of_each_form(present, kept), files, kept, given.evaluation, options)
        share_times(kept)
    # What an earlier run measured is shown too, where this one goes on with it.
    order = [Variant(FLOAT, "float"), *variants([]), *PEERS]
    shown = {v.name: kept.rows[v.name] for v in order if v.name in kept.rows}
    return tables(shown, kept.rates, options), plot(shown)


def prepare(options: argparse.Namespace) -> Inputs:
    """The off-grid model and the texts; made where they are missing."""
    work: Path = options.work
    source = options.off_grid
    if source is None:
        source = work / "off-grid" / "model.onnx"
        if not source.exists():
            exported = options.source or work / "export" / "model.onnx"
            if not exported.exists():
                export(load_module("sdpa"), exported, "dynamo", 21)
            model = load(exported)
            done = off_grid(model)
            save(model, source, external_data=True)
            print(f"off-grid model: {done.norms} norms folded, {len(done.pairs)} pairs of layers scaled", flush=True)
    tokenizer = options.tokenizer or work / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        save_tokenizer(tokenizer)
    evaluation = options.text.read_text("utf-8") if options.text else wikipedia("evaluation")
    calibration = options.calibration.read_text("utf-8") if options.calibration else wikipedia("calibration")
    tokens = work / "calibration.npy"
    work.mkdir(parents=True, exist_ok=True)
    np.save(tokens, tokenize(calibration, tokenizer))
    ids = tokenize(evaluation, tokenizer)[: options.windows * WINDOW]
    return Inputs(source, work / FLOAT / "model.onnx", ids, tokens)


def made(variant: Variant, row: Row, given: Inputs, options: argparse.Namespace) -> Path | None:
    """The variant's file, made where it is missing; None where that fails, and the row says why."""
    file = options.work / variant.name.replace(" ", "-").replace(",", "") / "model.onnx"
    if file.exists():
        row.missing = ""
        return file
    data = {"tokens": str(given.calibration), "window": WINDOW, "samples": options.samples}
    try:
        if variant.kind == "peer":
            found = make_peer(variant, file, given.source, given.optimized, options.threads)
        else:
            recipe = load_recipe("exact") if variant.kind == "float" else recipe_of(variant.method, variant.setting)
            found = make(given.source, file, recipe, assume=ASSUMED, data=data, threads=options.threads)
    except GraphoptError as error:
        shutil.rmtree(file.parent, ignore_errors=True)
        row.missing = str(error)
        return None
    row.seconds, row.peak, row.missing = found["seconds"], found["peak"], ""
    left = "".join(f"; left {count}: {reason}" for reason, count in found["left"].items())
    print(f"{variant.name}: made in {row.seconds:.0f} s, {bytes_of(variant, file) / 1e6:.1f} MB{left}", flush=True)
    return file


def bytes_of(variant: Variant, file: Path) -> int:
    """Bytes on disk; llama.cpp's files aren't ONNX models."""
    return file.stat().st_size if variant.method in LLAMA else size(file)


# ---- quality


def judge(
    pending: Sequence[Variant],
    files: dict[str, Path],
    kept: Kept,
    ids: npt.NDArray[np.int64],
    options: argparse.Namespace,
) -> None:
    """Fill in perplexity, divergence and agreement; all on the same tokens."""
    for start in range(0, len(pending), TOGETHER):
        group = pending[start : start + TOGETHER]
        opened = []
        for variant in list(group):
            row = kept.rows[variant.name]
            try:
                candidate = scorer(variant, files[variant.name], options.threads)
                opened.append(candidate if isinstance(candidate, Generator) else generator(candidate, options))
            except GraphoptError as error:
                row.missing = str(error)
                group.remove(variant)
        found = language_quality(generator(files[FLOAT], options), opened, ids, WINDOW, threads=options.threads)
        for variant, quality in zip(group, found, strict=True):
            row = kept.rows[variant.name]
            row.perplexity, row.kl, row.top1 = quality["ppl"], quality["kl"], quality["top1"]
            kept.rows[FLOAT].perplexity = quality.metric("ppl").reference
            print(f"{variant.name}: perplexity {row.perplexity:.3f}, KL {row.kl:.4f}, same {row.top1:.2%}", flush=True)
        kept.write()
        del opened
        release_memory()


def generator(file: Path, options: argparse.Namespace) -> Generator:
    """A generator with the threads asked for."""
    return Generator(file, threads=options.threads)


# ---- speed


def time_all(
    pending: Sequence[Variant],
    files: dict[str, Path],
    kept: Kept,
    ids: npt.NDArray[np.int64],
    options: argparse.Namespace,
) -> None:
    """Fill in the speeds, some systems at a time: first the peers and what they are compared with."""
    first = [v for v in pending if v.name in BESIDE_PEERS or v.method in (GENAI, *LLAMA)]
    rest = [v for v in pending if v not in first]
    groups = [first, *(rest[i : i + TOGETHER] for i in range(0, len(rest), TOGETHER))]
    for group in groups:
        if group:
            time_group(group, files, kept, ids, options)
            kept.rates.setdefault("limit", read_bandwidth(options.threads))
            kept.write()


def form_of(file: Path) -> str:
    """What the time of a file hangs on: its nodes with their settings, and the types and shapes of its weights."""
    model = load(file)
    lines = []
    for node in model.graph:
        settings = sorted(f"{name}={attr.value}" for name, attr in node.attributes.items() if attr.type.name != "GRAPH")
        weights = [f"{v.dtype} {v.shape}" if v is not None and v.is_initializer() else "" for v in node.inputs]
        lines.append(f"{node.domain} {node.op_type} {settings} {weights}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def one_of_each_form(present: Sequence[Variant], kept: Kept) -> list[Variant]:
    """The variants that are to be timed: where files differ in the numbers of their weights alone, one of them."""
    known = {row.form for row in kept.rows.values() if row.form and row.decode is not None}
    chosen = []
    for variant in sorted(present, key=lambda v: v.name not in BESIDE_PEERS):
        form = kept.rows[variant.name].form
        if kept.rows[variant.name].decode is None and (not form or form not in known):
            chosen.append(variant)
            known.add(form)
    return chosen


def share_times(kept: Kept) -> None:
    """Give the rows that weren't timed the times of the row of their form."""
    timed = {row.form: (name, row) for name, row in kept.rows.items() if row.form and row.decode and not row.timed_as}
    for row in kept.rows.values():
        if row.decode is None and row.form in timed:
            row.timed_as, twin = timed[row.form]
            row.prefill, row.decode = twin.prefill, twin.decode
    kept.write()


def time_group(
    group: Sequence[Variant],
    files: dict[str, Path],
    kept: Kept,
    ids: npt.NDArray[np.int64],
    options: argparse.Namespace,
) -> None:
    """Time some systems beside the float model, in two sittings, in which the sessions are made in opposite order."""
    prompt = np.asarray(ids[: options.prompt_tokens], np.int64)[None]
    ratios: dict[str, list[tuple[float, ...]]] = {v.name: [] for v in group}
    rates: dict[str, list[float]] = {"prefill": [], "decode": [], "control": []}
    # Of the sessions of a process the later ones run faster, whatever they are: each is made both early and late.
    for order in (list(group), list(reversed(group))):
        opened: dict[str, Any] = {}
        for variant in order:
            try:
                opened[variant.name] = system(variant, files[variant.name], options.threads)
            except (GraphoptError, ImportError, OSError, ValueError) as error:
                print(f"{variant.name} isn't timed: {error}", flush=True)
        if not opened:
            return
        result = benchmark_decoding(
            [generator(files[FLOAT], options), *opened.values()], generator(files[FLOAT], options), prompt,
            options.new_tokens, options.rounds, threads=options.threads,
        )  # fmt: skip
        rates["prefill"].append(result.models[0].prefill_tokens_s)
        rates["decode"].append(result.models[0].decode_tokens_s)
        rates["control"].append(result.control.decode_ratio.median)
        for name, timing in zip(opened, result.models[1:], strict=True):
            prefill, decode = timing.prefill_ratio, timing.decode_ratio
            ratios[name].append((prefill.median, prefill.uncertainty, decode.median, decode.uncertainty))
        del opened, result
        release_memory()
    for name, values in ratios.items():
        if values:
            means = [statistics.mean(column) for column in zip(*values, strict=True)]
            kept.rows[name].prefill, kept.rows[name].decode = (means[0], means[1]), (means[2], means[3])
    for part in ("prefill", "decode"):
        kept.rates.setdefault(part, statistics.mean(rates[part]))
    kept.rates["control"] = max(kept.rates.get("control", 0.0), *(abs(r - 1) for r in rates["control"]))
    names = ", ".join(f"{name} {kept.rows[name].decode[0]:.2f}" for name in ratios if kept.rows[name].decode)
    print(f"decode time over {FLOAT}'s: {names}", flush=True)


# ---- what is shown


def tables(rows: dict[str, Row], rates: dict[str, float], options: argparse.Namespace) -> list[str]:
    """A table for each setting, and what is missing."""
    base = rows[FLOAT]
    lines = [
        f"Off-grid SmolLM2-135M, {options.windows} windows of {WINDOW} tokens; {FLOAT}: {base.bytes / 1e6:.1f} MB"
        + (f", perplexity {base.perplexity:.3f}" if base.perplexity else "")
        + (f", {rates['prefill']:.0f} tokens/s read and {rates['decode']:.1f} written" if "decode" in rates else "")
        + f", {options.threads} threads. Calibration: {options.samples} windows of another text."
    ]
    limit = rates.get("limit", math.nan)
    for section in (*map(str, SETTINGS), ACTIVATIONS):
        inside = {n: r for n, r in rows.items() if r.section == section and r.kind != "float" and not r.missing}
        if not inside:
            continue
        rtn = rows.get(f"rtn, {section}")
        lines += ["", f"**{section[:1].upper()}{section[1:]}**", ""]
        lines.append(
            "| method | MB | perplexity | of RTN's loss closed | KL | same token | prefill tokens/s | decode tokens/s "
            "| of the memory limit | made in s, peak MB |"
        )
        lines.append("|---|---|---|---|---|---|---|---|---|---|")
        order = sorted(inside.items(), key=lambda item: (list(SERIES).index(item[1].kind), item[1].kl or math.inf))
        lines += [line(name, row, base, rtn, rates, limit) for name, row in order]
    if "control" in rates:
        lines += ["", f"Noise: the float model against itself is off by up to {rates['control']:.1%}."]
    if any(row.timed_as for row in rows.values()):
        lines.append("Files that differ in the numbers of their weights alone are timed once; \\* marks the others.")
    missing = [(name, row.missing) for name, row in rows.items() if row.missing]
    if missing:
        lines += ["", "Left out:", ""] + [f"- {name}: {reason}" for name, reason in missing]
    return lines


def line(name: str, row: Row, base: Row, rtn: Row | None, rates: dict[str, float], limit: float) -> str:
    """One row of a table."""
    closed = ""
    if rtn is not None and row.perplexity and rtn.perplexity and base.perplexity and rtn is not row:
        loss = rtn.perplexity - base.perplexity
        closed = f"{(rtn.perplexity - row.perplexity) / loss:.0%}" if loss > 0 else ""
    speeds = []
    for part, ratio in (("prefill", row.prefill), ("decode", row.decode)):
        known = ratio is not None and part in rates
        mark = "\\*" if row.timed_as else ""
        cell = f"{rates[part] / ratio[0]:.0f} ± {rates[part] / ratio[0] ** 2 * ratio[1]:.0f}{mark}" if known else ""
        speeds.append(cell)
    share = f"{row.bytes * rates['decode'] / row.decode[0] / limit:.0%}" if row.decode and limit == limit else ""
    quality = ["", "", ""]
    if row.perplexity is not None and row.kl is not None and row.top1 is not None:
        quality = [f"{row.perplexity:.2f}" if row.perplexity < 1e4 else f"{row.perplexity:.1e}", f"{row.kl:.4f}"]
        quality.append(f"{row.top1:.1%}")
    took = f"{row.seconds:.0f}, {row.peak / 1e6:.0f}" if row.peak else f"{row.seconds:.0f}" if row.seconds else ""
    shown = name.split(", ")[0]
    shown = f"**{shown}**" if row.kind == "automatic" else shown
    cells = [shown, f"{row.bytes / 1e6:.1f}", quality[0], closed, quality[1], quality[2], *speeds, share, took]
    return f"| {' | '.join(cells)} |"


def plot(rows: dict[str, Row]) -> str | None:
    """The Pareto plot of divergence by bytes; None where nothing was judged."""
    points = [
        Point(name, SERIES[row.kind], row.bytes / 1e6, max(row.kl, 1e-6))
        for name, row in rows.items()
        if row.kl is not None and math.isfinite(row.kl) and row.bytes and row.kind != "float"
    ]
    if not points:
        return None
    ordered = sorted(points, key=lambda p: list(SERIES.values()).index(p.series))
    return pareto_svg(
        ordered, "MB on disk", "KL from float32, nats", title="Off-grid SmolLM2-135M: divergence by size", highest=8.0
    )
