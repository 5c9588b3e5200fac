"""Encoders with fewer attentions, MLPs or layers: what each choice of them loses, and what healing gives back.

    python benchmarks/depth_encoders.py --page docs/depth.md
    python benchmarks/depth_encoders.py --only MiniLM --page docs/depth.md

Two models: MiniLM, a post-LN encoder of 6 layers, judged by the rank correlation of the similarities of sentences, and
a pre-LN ViT of 12 layers, which `graphopt.models.fashion` trains the first time, by its top-1 over the test pictures of
Fashion-MNIST. Models, data and judges are those of `quantization_models.py`; searches and healing see the calibration
sentences and training pictures alone. One greedy search gives all its sets, and the scores of one-shot. CPU time is
measured on one thread in turn with the original's. What was measured is kept in the folder for graphs, by what was
removed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measured_page import circumstances, put_tables
from quantization_models import CASES, ORIGINAL, Case, timed
from quantization_variants import size

import graphopt
from graphopt.calibration.data import ArrayDataset
from graphopt.errors import GraphoptError
from graphopt.passes.depth.positions import by_position
from graphopt.report.pareto import Point, pareto_svg
from graphopt.verification.quality.runs import judge

GREEDY, ONE_SHOT, LAST, ALTERNATE = "greedy by loss", "one-shot by loss", "the last ones", "every other one"
SERIES = (
    (GREEDY, "none"), (GREEDY, "affine"), (GREEDY, "linear"), (ONE_SHOT, "none"), (LAST, "none"), (LAST, "linear"),
    (ALTERNATE, "none"), (ALTERNATE, "linear"),
)  # fmt: skip
AT_ONCE = 8
"""Variants that are judged beside the original at a time."""
WHOLE = "nothing"
"""What is removed of the model that is optimized alone."""
CALLED = {"block": "layers", "attention": "attentions", "mlp": "MLPs"}


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model of which parts are removed.

    Attributes:
        case: The model with its data.
        metric: The name of what judges it, from 0 to 1, higher being better.
        counts: How many go, by granularity.
        batches: How many batches of each split are used at most.
        samples: Batches that searches see.
    """

    case: Case
    metric: str
    counts: dict[str, tuple[int, ...]]
    batches: int
    samples: int


def _case(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


SUBJECTS = (
    Subject(_case("MiniLM"), "spearman", dict.fromkeys(CALLED, (1, 2, 3)), 120, 48),
    Subject(
        _case("Fashion-MNIST vit-deep"), "accuracy",
        {"block": (1, 2, 3, 4, 5, 6), "attention": (1, 2, 4, 6)}, 80, 4,
    ),
)  # fmt: skip

Row = dict[str, Any]


class Encoder:
    """The variants of one model, with what was measured of them.

    Args:
        subject: The model.
        work: The folder for graphs and results.
        rounds: Of timing.
        threads: Of judging.
    """

    def __init__(self, subject: Subject, work: Path, rounds: int, threads: int) -> None:
        self.subject, self.rounds, self.threads = subject, rounds, threads
        self.work = work / re.sub(r"\W+", "-", subject.case.name.lower())
        self._kept = self.work / "rows.json"
        held = json.loads(self._kept.read_text()) if self._kept.exists() else {}
        self.sets: dict[str, dict[str, dict[str, list[str]]]] = held.get("sets", {})
        """What goes, by granularity, series and number."""
        self.rows: dict[str, Row] = held.get("rows", {})
        self.samples: str = held.get("samples", "")

    def measure(self) -> None:
        """Fill in what is missing."""
        case, most = self.subject.case, self.subject.batches
        self.work.mkdir(parents=True, exist_ok=True)
        self._source = case.file(self.work)
        self._calibration = ArrayDataset(case.batches("calibration", self._source)[:most])
        self._judged = case.batches("evaluation", self._source)[:most]
        self._canonical = self.work / "canonical.onnx"
        if not self._canonical.exists():
            graphopt.optimize(self._source, "canonical", verify="none").save(self._canonical)
        self.rows.setdefault(ORIGINAL, {"bytes": size(self._source)})
        if WHOLE not in self.rows:
            self._measured({WHOLE: ([], "none")})
        for granularity, counts in self.subject.counts.items():
            if granularity not in self.sets:
                self.sets[granularity] = self._chosen(granularity, counts)
                self._write()
            chosen = self.sets[granularity]
            wanted = {
                key(branches, heal): (branches, heal)
                for series, heal in SERIES
                for branches in (chosen[series][str(n)] for n in counts)
            }
            missing = [name for name in wanted if name not in self.rows]
            for first in range(0, len(missing), AT_ONCE):
                self._measured({name: wanted[name] for name in missing[first : first + AT_ONCE]})

    def _write(self) -> None:
        data = {"sets": self.sets, "rows": self.rows, "samples": self.samples}
        self._kept.write_text(json.dumps(data, indent=1))

    def _chosen(self, granularity: str, counts: Sequence[int]) -> dict[str, dict[str, list[str]]]:
        options = self._made(
            {"granularity": granularity, "count": counts[-1], "search": "greedy", "samples": self.subject.samples}
        )
        scores: dict[str, float] = options["scores"]
        names = sorted(scores, key=lambda name: int(name.rpartition(".")[2]))
        return {
            GREEDY: {str(n): options["path"][n - 1]["branches"] for n in counts},
            ONE_SHOT: {str(n): sorted(scores, key=lambda name: scores[name])[:n] for n in counts},
            LAST: {str(n): [names[i] for i in by_position("last", len(names), n)] for n in counts},
            ALTERNATE: {str(n): [names[i] for i in by_position("alternate", len(names), n)] for n in counts},
        }

    def _made(self, options: dict[str, Any], file: Path | None = None) -> dict[str, Any]:
        """The options that drop-layers ends with; the result is written where a file is given."""
        recipe = {"passes": [{"drop-layers": options}, {"recipe": "lower"}]}
        needs = "branches" not in options or options.get("heal", "none") != "none"
        result = graphopt.optimize(
            self._canonical, recipe, verify="none", calibration=self._calibration if needs else None
        )
        record = next(record for record in result.report.run.records if record.name == "drop-layers")
        if record.status == "rolled back":
            raise GraphoptError(f"{self.subject.case.name}: {record.name} was taken back: {record.detail}")
        if file is not None:
            result.save(file)
        return dict(record.options)

    def _measured(self, wanted: dict[str, tuple[list[str], str]]) -> None:
        """Make some variants, branches and healing by name, and judge and time them beside each other."""
        files = {name: self.work / f"{number}.onnx" for number, name in enumerate(wanted)}
        for name, (branches, heal) in wanted.items():
            self._made({"branches": branches, "heal": heal}, files[name])
        case = self.subject.case
        found = judge(self._source, [*files.values()], self._judged, case.measure(self._source), threads=self.threads)
        # Healing changes no time.
        plain = {name: file for name, file in files.items() if wanted[name][1] == "none"}
        times = timed({ORIGINAL: self._source, **plain}, self._judged, self.rounds) if plain else {}
        for (name, file), quality in zip(files.items(), found, strict=True):
            self.samples = quality.samples
            metrics = {metric.name: metric for metric in quality.metrics}
            row: Row = {"bytes": size(file), "metrics": {of: metric.value for of, metric in metrics.items()}}
            if name in times:
                row["time"] = [times[name].median, times[name].uncertainty]
            self.rows[name] = row
            self.rows[ORIGINAL]["reference"] = metrics[self.subject.metric].reference
            print(f"{case.name} without {name}: {row}", flush=True)
            file.unlink()
        self._write()

    # ---- what is shown

    def row(self, granularity: str, series: str, heal: str, count: int) -> Row | None:
        """What was measured without so many."""
        branches = self.sets.get(granularity, {}).get(series, {}).get(str(count))
        return None if branches is None else self.rows.get(key(branches, heal))

    def value(self, row: Row) -> float:
        """By which it is judged."""
        return float(row["metrics"][self.subject.metric])

    def table(self) -> list[str]:
        """Lines of Markdown; none where nothing was measured."""
        if not self.samples:
            return []
        whole, percent = self.rows[ORIGINAL], self.subject.metric == "accuracy"
        known = f" top-1 {whole['reference']:.2%}," if percent else ""
        named = "Top-1" if percent else "Rank correlation (Spearman) of similarities with the original's"
        lines = [
            "", f"**{self.subject.case.name}**", "",
            f"{named}, over {self.samples}. The whole model:{known} {whole['bytes'] / 1e6:.2f} MB.{self._optimized()}",
        ]  # fmt: skip
        for granularity, counts in self.subject.counts.items():
            if not any(self.row(granularity, series, heal, n) for series, heal in SERIES for n in counts):
                continue
            lines += ["", f"| without {CALLED[granularity]} | {' | '.join(map(str, counts))} |"]
            lines.append(f"|---|{'---|' * len(counts)}")
            for series, heal in SERIES:
                rows = [self.row(granularity, series, heal, n) for n in counts]
                cells = [self._cell(row) for row in rows]
                if not any(cells):
                    continue
                lines.append(f"| {series}{'' if heal == 'none' else f', healed ({heal})'} | {' | '.join(cells)} |")
            kept = [self.row(granularity, GREEDY, "none", n) or {} for n in counts]
            sizes = [f"{row['bytes'] / whole['bytes']:.1%}" if row else "" for row in kept]
            times = [_ratio(row) if "time" in row else "" for row in kept]
            lines += [f"| bytes of the file | {' | '.join(sizes)} |", f"| CPU time | {' | '.join(times)} |"]
            if chosen := self.sets.get(granularity, {}).get(GREEDY):
                lines += ["", f"Greedy search removes: {', '.join(chosen[str(counts[-1])])}."]
        return lines

    def _optimized(self) -> str:
        """A sentence on the model that is optimized alone, which tells what is owed to that."""
        row = self.rows.get(WHOLE)
        if row is None:
            return ""
        ratio = row["bytes"] / self.rows[ORIGINAL]["bytes"]
        return f" Optimized with all layers it has {ratio:.1%} of the bytes and {_ratio(row)} of the CPU time."

    def _cell(self, row: Row | None) -> str:
        if row is None:
            return ""
        return f"{self.value(row):.2%}" if self.subject.metric == "accuracy" else f"{self.value(row):.4f}"

    def plot(self) -> str | None:
        """Loss by bytes of the file, as SVG, of what greedy search removes; None where nothing was measured."""
        points = []
        for granularity, counts in self.subject.counts.items():
            for heal in ("none", "linear"):
                for n in counts:
                    if (row := self.row(granularity, GREEDY, heal, n)) is not None:
                        series = f"{CALLED[granularity]}{', healed' if heal != 'none' else ''}"
                        label, loss = f"{n} {CALLED[granularity]}", 1 - self.value(row)
                        points.append(Point(label, series, row["bytes"] / 1e6, loss))
        percent = self.subject.metric == "accuracy"
        title = f"{self.subject.case.name} with fewer layers"
        called = "top-1 error" if percent else "1 − rank correlation"
        return pareto_svg(points, "MB on disk", called, title=title, log=not percent) if points else None


def _ratio(row: Row) -> str:
    return "{:.2f} ± {:.2f}".format(*row["time"])


def key(branches: Sequence[str], heal: str) -> str:
    """The name by which a variant's numbers are kept."""
    names = ", ".join(sorted(branches, key=lambda name: (int(name.rpartition(".")[2]), name))) or WHOLE
    return names if heal == "none" else f"{names}, healed ({heal})"


def main() -> int:
    """Measure what is missing, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("depth-encoders"), help="folder for graphs and results, kept")
    parser.add_argument("--only", nargs="+", default=[], help="models; default: all")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of timing")
    parser.add_argument("--threads", type=int, default=2, help="threads of judging; CPU time is of one")
    parser.add_argument("--page", type=Path, help="write the tables there, and the plots beside it")
    options = parser.parse_args()
    lines, plots = [circumstances()], {}
    for subject in SUBJECTS:
        encoder = Encoder(subject, options.work, options.rounds, options.threads)
        if not options.only or any(word.lower() in subject.case.name.lower() for word in options.only):
            try:
                encoder.measure()
            except GraphoptError as error:
                print(f"error: {error}", file=sys.stderr)
                return error.exit_code
        lines += encoder.table()
        if (plot := encoder.plot()) is not None:
            plots[encoder.work.name] = plot
    text = "\n".join(lines)
    print(text)
    if options.page is not None:
        put_tables(options.page, "encoders", text)
        for name, plot in plots.items():
            options.page.with_name(f"{options.page.stem}-{name}.svg").write_text(plot, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
