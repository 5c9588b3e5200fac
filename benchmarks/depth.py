"""SmolLM2 with fewer attentions or layers: what each score and search loses, what healing gives back, what it saves.

    python benchmarks/depth.py --source model.onnx --tokenizer folder --page docs/depth.md
    python benchmarks/depth.py                                    exports the model first (export_smollm2.py)
    python benchmarks/depth.py --only "attention, loss 4" --windows 2 --pasts

All files are made from one export with the same assumptions. Searches see eight windows of 512 tokens of the
calibration text of `graphopt.models.texts`, healing all of it; perplexity and the mean divergence KL(original, variant)
are over windows of its evaluation text. One search gives all sizes: the rows of a greedy search are the sets that it
went through, those of a score the lowest so many. Speeds are measured as by `quantize_kv.py`. What was measured is kept
in the folder for graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from decoder_rows import WINDOW, Decoder, Found, Steps, Variant, arguments, measured
from measured_page import circumstances, put_tables

from graphopt.report.pareto import Point, pareto_svg

FLOAT = "all layers"
COUNTS = {"attention": (1, 2, 3, 4, 6, 8), "block": (1, 2, 3, 4)}
CALLED = {"attention": "attention", "block": "layers"}
SAMPLES = 8
"""Windows of 512 tokens that a search sees. By two an attention was chosen whose loss on others isn't the smallest."""
SHORTLIST = 10
"""Candidates by which a greedy search grows a set from the second step on."""
OUTSIDE = {
    "attention": {1: 18.47, 2: 18.91, 3: 19.74, 4: 21.11, 6: 22.88, 8: 25.20},
    "block": {1: 20.05, 2: 22.46, 3: 24.83, 4: 30.47},
}
"""Perplexities of the better of two one-shot scores on the same text, measured with other code, without healing."""

POSITIONS = ("last", "uniform", "symmetric")
SERIES = {
    "last": "by position: the last ones",
    "uniform": "by position: spread evenly",
    "symmetric": "by position: the middle",
    "loss": "one-shot by loss",
    "perplexity": "one-shot by perplexity",
    "influence": "one-shot by influence",
    "greedy": "greedy by loss",
    "healed": "greedy by loss, healed",
}
"""Kinds of rows, as they are called in their names and on the page."""


def _searched(granularity: str, **options: object) -> Steps:
    most = COUNTS[granularity][-1]
    return ({"drop-layers": {"granularity": granularity, "count": most, "samples": SAMPLES, **options}},)


def _lowest(count: int) -> Callable[[Found], Steps]:
    """The branches that scored lowest."""

    def steps(found: Found) -> Steps:
        scores: dict[str, float] = found["scores"]
        return ({"drop-layers": {"branches": sorted(scores, key=lambda name: scores[name])[:count]}},)

    return steps


def _passed(count: int, heal: str = "none") -> Callable[[Found], Steps]:
    """The set of so many that the greedy search went through."""
    return lambda found: ({"drop-layers": {"branches": found["path"][count - 1]["branches"], "heal": heal}},)


def variants() -> list[Variant]:
    """The rows; of each kind the largest one searches, and comes first."""
    found = [Variant(FLOAT, "")]
    for granularity, counts in COUNTS.items():
        kind, most = CALLED[granularity], counts[-1]
        for position in POSITIONS:
            given = {"granularity": granularity, "score": position}
            found += [
                Variant(f"{kind}, {position} {n}", SERIES[position], ({"drop-layers": {**given, "count": n}},))
                for n in counts
            ]
        for score in ("loss", "perplexity", "influence"):
            source = f"{kind}, {score} {most}"
            found.append(Variant(source, SERIES[score], _searched(granularity, score=score)))
            found += [Variant(f"{kind}, {score} {n}", SERIES[score], takes=(source, _lowest(n))) for n in counts[:-1]]
        source = f"{kind}, greedy {most}"
        greedy = {"search": "greedy", "shortlist": SHORTLIST}
        found.append(Variant(source, SERIES["greedy"], _searched(granularity, **greedy)))
        found += [Variant(f"{kind}, greedy {n}", SERIES["greedy"], takes=(source, _passed(n))) for n in counts[:-1]]
        found += [
            Variant(f"{kind}, healed {n}", SERIES["healed"], takes=(source, _passed(n, "linear"))) for n in counts
        ]
    return found


TIMED = (FLOAT, *(f"{CALLED[granularity]}, greedy {n}" for granularity, counts in COUNTS.items() for n in counts))
"""Of the same layers removed, healed or not, a token takes the same time."""


def main() -> int:
    """Make what is missing, measure, print, and write the page."""
    options = arguments(__doc__, "depth-benchmark", (256,)).parse_args()
    decoder = Decoder(variants(), options, keep=("scores", "path", "branches"))

    def put(page: Path, text: str) -> None:
        put_tables(page, "depth", text)
        page.with_suffix(".svg").write_text(plot(decoder), encoding="utf-8")
        page.with_name(f"{page.stem}-speed.svg").write_text(plot_speed(decoder), encoding="utf-8")

    return measured(decoder, TIMED, lambda decoder: [circumstances(), "", *tables(decoder)], put)


def tables(decoder: Decoder) -> list[str]:
    """The tables as lines of Markdown."""
    whole = decoder.rows[FLOAT]
    lines = [
        f"Perplexity over {decoder.options.windows} windows of {WINDOW} tokens of Wikipedia; with all layers "
        f"{whole.perplexity:.2f}, {whole.size / 1e6:.1f} MB."
    ]
    shown = decoder.shown()
    for granularity, counts in COUNTS.items():
        kind = CALLED[granularity]
        lines += ["", f"**Without {'attentions' if granularity == 'attention' else 'layers'}**", ""]
        lines += [f"| | {' | '.join(map(str, counts))} |", f"|---|{'---|' * len(counts)}"]
        for name, series in SERIES.items():
            rows = [shown.get(f"{kind}, {name} {n}") for n in counts]
            lines.append(f"| {series} | {_cells([row and f'{row.perplexity:.2f}' for row in rows])} |")
        outside = [f"{OUTSIDE[granularity][n]:.2f}" for n in counts]
        lines.append(f"| the better of two one-shot scores, with other code | {_cells(outside)} |")
        kept = [shown.get(f"{kind}, greedy {n}") for n in counts]
        lines.append(f"| bytes of the file | {_cells([row and f'{row.size / whole.size:.1%}' for row in kept])} |")
        of_cache = [row and f"{row.bytes[4096] / whole.bytes[4096]:.1%}" for row in kept]
        lines.append(f"| bytes of the cache | {_cells(of_cache)} |")
        last = decoder.rows.get(f"{kind}, greedy {counts[-1]}")
        if last is not None and last.found.get("path"):
            named = ", ".join(last.found["path"][-1]["branches"])
            lines += ["", f"The {counts[-1]} that greedy search removes: {named}."]
    return [*lines, "", *decoder.speed_table()]


def _cells(values: Sequence[str | None]) -> str:
    return " | ".join(value or "" for value in values)


def plot(decoder: Decoder) -> str:
    """Divergence by bytes of the file."""
    points = [
        Point(name, f"{name.split(',')[0]}, {row_series}", row.size / 1e6, max(row.kl, 1e-6))
        for name, row in decoder.shown().items()
        if name != FLOAT and name.split()[-2] in ("loss", "greedy", "healed")
        for row_series in [decoder.how[name].removeprefix("one-shot by ")]
    ]
    return pareto_svg(points, "MB on disk", "KL from all layers, nats", title="SmolLM2 with fewer layers")


def plot_speed(decoder: Decoder) -> str:
    """Divergence by the time of a token, greedily chosen and healed."""
    shown, points = decoder.shown(), []
    for granularity, counts in COUNTS.items():
        for name in ("greedy", "healed"):
            for n in counts:
                row = shown.get(f"{CALLED[granularity]}, {name} {n}")
                timed = shown.get(f"{CALLED[granularity]}, greedy {n}")
                if row is None or timed is None or not timed.speeds:
                    continue
                _, ratio, *_ = timed.speeds[min(timed.speeds)]
                series = f"{CALLED[granularity]}, {'healed' if name == 'healed' else 'not healed'}"
                points.append(Point(f"{CALLED[granularity]}, {name} {n}", series, ratio, max(row.kl, 1e-6)))
    title = "SmolLM2 with fewer layers, a token after 256"
    return pareto_svg(points, "time of a token, of that with all layers", "KL from all layers, nats", title=title)


if __name__ == "__main__":
    sys.exit(main())
