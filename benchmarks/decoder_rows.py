"""Rows of the benchmarks on one decoder: files by variant, what each loses, and how fast it decodes.

A benchmark is a list of `Variant`s and a page. What was made and measured is kept in the folder for graphs, so that a
run goes on where one ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from decoder_judge import session_options
from export_smollm2 import export, load_module, save_tokenizer
from timed_session import timed_options

import graphopt
from graphopt.analysis.interleaved import Ratio
from graphopt.api import describe_source
from graphopt.calibration.text import TextDataset, tokenize
from graphopt.errors import GraphoptError
from graphopt.models.texts import wikipedia
from graphopt.recipe import load as load_recipe
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.memory_session import release_memory
from graphopt.verification.quality.language import language_quality

WINDOW = 512
ASSUMED = ("no-left-padding", "no-batched-chunks", "counted-positions", "max-length=8192")
CACHED = (512, 4096, 32768)
"""Tokens for which the bytes of a cache are told."""
AT_ONCE = 4
"""Variants that are judged beside the original at a time."""

Steps = Sequence[Mapping[str, Any]]
Found = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        name: What the row is called.
        how: What was done.
        passes: The passes behind the recipe canonical.
        behind: Those behind the recipe lower.
        chunk: Tokens that are fed at a time where it is judged.
        takes: The row whose findings give the passes behind canonical, and how; None: `passes` it is.
    """

    name: str
    how: str
    passes: Steps = ()
    behind: Steps = ()
    takes: tuple[str, Callable[[Found], Steps]] | None = None
    chunk: int = WINDOW


@dataclasses.dataclass
class Row:
    """What was measured of a variant.

    Attributes:
        size: Bytes of the file and its weights.
        seconds: Of the making.
        found: Options that a search of it found.
        perplexity: Over all windows; None: not judged yet.
        kl: Mean of KL(original, variant) in nats.
        agreement: Part of the tokens after which the most probable one is the original's.
        bytes: Of the cache by number of tokens.
        speeds: (tokens per second, ratio of times to those of the original, its uncertainty, ratio of CPU times, its
            uncertainty) by tokens in the cache.
        recall: Part of the digits that are recalled, where that is asked for.
    """

    size: int = 0
    seconds: float = 0.0
    found: Found = dataclasses.field(default_factory=dict)
    perplexity: float | None = None
    kl: float = 0.0
    agreement: float = 0.0
    bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    speeds: dict[int, tuple[float, float, float, float, float]] = dataclasses.field(default_factory=dict)
    recall: float | None = None


class Decoder:
    """A benchmark's variants of SmolLM2, with their rows.

    Args:
        variants: The variants; the first one is the original.
        options: Of `arguments`.
        keep: Names of options whose found values are kept with the row.
    """

    def __init__(self, variants: Sequence[Variant], options: argparse.Namespace, keep: Sequence[str] = ()) -> None:
        self.original, self.options, self.keep = variants[0].name, options, keep
        self.variants = [v for v in variants if not options.only or v.name in (self.original, *options.only)]
        self.how = {variant.name: variant.how for variant in variants}
        self.control = f"{self.original} (control)"
        self.rows: dict[str, Row] = {}
        self.files: dict[str, Path] = {}
        self._kept = options.work / "rows.json"
        if self._kept.exists():
            for name, data in json.loads(self._kept.read_text()).items():
                numbers = {key: {int(n): value for n, value in data[key].items()} for key in ("bytes", "speeds")}
                self.rows[name] = Row(**{**data, **numbers})

    def write(self) -> None:
        """Keep the rows."""
        data = {name: dataclasses.asdict(row) for name, row in self.rows.items()}
        self._kept.write_text(json.dumps(data, indent=1))

    # ---- the files

    def make(self, timed: Sequence[str] = ()) -> None:
        """Make the files that are missing, of rows that aren't judged, or are to be timed and weren't all."""
        options = self.options
        options.work.mkdir(parents=True, exist_ok=True)
        if options.source is None:
            options.source = options.work / "export" / "model.onnx"
            options.tokenizer = options.tokenizer or options.work
            if not options.source.exists():
                export(load_module("sdpa"), options.source, "dynamo", 21)
                save_tokenizer(options.tokenizer)
        rows = {variant.name: self.rows.get(variant.name, Row()) for variant in self.variants}
        pending = any(past not in rows[name].speeds for name in timed if name in rows for past in options.pasts)
        for variant in self.variants:
            judged = rows[variant.name].perplexity is not None
            if judged and variant.name != self.original and not (pending and variant.name in timed):
                continue
            file = options.work / f"{variant.name.replace(' ', '-').replace(',', '')}.onnx"
            self.files[variant.name] = file
            if not file.exists():
                self._made(variant, file)
                self.write()

    def _made(self, variant: Variant, file: Path) -> None:
        begin = time.perf_counter()
        recipe = self._recipe(variant)
        needs = any(getattr(one, "needs", ()) for one in load_recipe(recipe).passes())
        text = TextDataset(tokenize(wikipedia("calibration"), self.options.tokenizer), WINDOW)
        result = graphopt.optimize(
            self.options.source, recipe, assume=ASSUMED, verify="none", calibration=text if needs else None
        )
        row = self.rows.setdefault(variant.name, Row())
        for record in result.report.run.records:
            if record.status == "rolled back":
                raise GraphoptError(f"{variant.name}: {record.name} was taken back: {record.detail}")
            row.found |= {key: record.options[key] for key in self.keep if record.options.get(key)}
        result.save(file, external_data=True)
        row.seconds, row.size = time.perf_counter() - begin, int(describe_source(graphopt.load(file))["bytes"])
        print(f"{variant.name}: made in {row.seconds:.0f} s, {row.size / 1e6:.1f} MB", flush=True)
        del result
        release_memory()

    def _recipe(self, variant: Variant) -> dict[str, Any]:
        passes = variant.passes
        if variant.takes is not None:
            name, steps = variant.takes
            if name not in self.rows:
                raise GraphoptError(f"{variant.name} takes what {name} finds, which must be made first.")
            passes = steps(self.rows[name].found)
        inner = [{name: dict(given) for name, given in step.items()} for step in (*passes, {"": {}}, *variant.behind)]
        place = inner.index({"": {}})
        inner[place] = {"recipe": "lower"}
        return {"passes": [{"recipe": "canonical"}, *inner]}

    # ---- what it costs

    def judge(self, recall: Callable[[Generator], float] | None = None) -> None:
        """Fill in perplexity, divergence, agreement and the bytes of the cache; `recall` by what is given."""
        missing = [name for name in self.files if name not in self.rows or self.rows[name].perplexity is None]
        if not missing:
            return
        ids = self.evaluation()[: self.options.windows * WINDOW]
        original = self.generator(self.original)
        chunks = {variant.name: variant.chunk for variant in self.variants}
        alike = [[name for name in missing if chunks[name] == chunk] for chunk in sorted({*chunks.values()})]
        for names in (group[i : i + AT_ONCE] for group in alike for i in range(0, len(group), AT_ONCE)):
            generators = [self.generator(name) for name in names]
            for name, generator, found in zip(
                names,
                generators,
                language_quality(original, generators, ids, WINDOW, chunk=chunks[names[0]]),
                strict=True,
            ):
                row = self.rows.setdefault(name, Row())
                row.perplexity, row.kl, row.agreement = found["ppl"], found["kl"], found["top1"]
                row.bytes = {tokens: generator.interface.bytes_at(tokens) for tokens in CACHED}
                row.recall = None if recall is None else recall(generator)
                told = "" if row.recall is None else f", recall {row.recall:.0%}"
                print(f"{name}: perplexity {row.perplexity:.3f}, KL {row.kl:.5f}{told}", flush=True)
            self.write()
            del generators, generator
            release_memory()

    def evaluation(self) -> npt.NDArray[np.int64]:
        """The tokens that judge."""
        text = self.options.text
        return tokenize(text.read_text("utf-8") if text else wikipedia("evaluation"), self.options.tokenizer)

    def generator(self, name: str) -> Generator:
        """One that runs a variant."""
        return Generator(self.files[name], sess_options=session_options(self.options.threads))

    # ---- how fast it is

    def time(self, names: Sequence[str]) -> None:
        """Fill in the speed of some variants with each number of tokens in the cache."""
        for past in self.options.pasts:
            chosen = [name for name in names if name in self.files]
            if not all(past in self.rows[name].speeds for name in chosen):
                self._timed(chosen, past)
                self.write()

    def _timed(self, names: Sequence[str], past: int) -> None:
        options, ids = self.options, self.evaluation()
        names = [self.original, *(name for name in names if name != self.original), self.control]
        wall: list[list[float]] = [[] for _ in names]
        cpu: list[list[float]] = [[] for _ in names]
        # Of the sessions of a process the later ones run faster, whatever they are: each is made both early and late.
        for order in (range(len(names)), reversed(range(len(names)))):
            running: dict[int, list[Any]] = {}
            for index in order:
                file = self.files.get(names[index], self.files[self.original])
                generator = Generator(file, sess_options=timed_options(options.threads))
                decoding = generator.start(1, past + options.new_tokens * (options.rounds + 1))
                running[index] = [decoding, generator.prefill(decoding, ids[None, :past]).argmax(-1)[:, None]]
            for number in range(options.rounds + 1):
                for index in np.random.default_rng(number).permutation(len(names)).tolist():
                    decoding, token = running[index]
                    begin, begin_cpu = time.perf_counter(), time.process_time()
                    for _ in range(options.new_tokens):
                        token = decoding.feed(token)[:, -1].argmax(-1)[:, None]
                    if number:
                        wall[index].append(time.perf_counter() - begin)
                        cpu[index].append(time.process_time() - begin_cpu)
                    running[index][1] = token
            del running, decoding, generator
            release_memory()
        for index, name in enumerate(names):
            ratio, work = Ratio.of(wall[index], wall[0]), Ratio.of(cpu[index], cpu[0])
            speed = options.new_tokens / statistics.median(wall[index])
            numbers = (speed, ratio.median, ratio.uncertainty, work.median, work.uncertainty)
            self.rows.setdefault(name, Row()).speeds[past] = numbers
            print(
                f"{name} after {past}: {speed:.1f} tokens/s, time {ratio.median:.2f}, CPU {work.median:.2f}", flush=True
            )

    # ---- what is shown

    def shown(self) -> dict[str, Row]:
        """The rows that were judged, in the order of the variants."""
        return {v.name: self.rows[v.name] for v in self.variants if self.rows[v.name].perplexity is not None}

    def speed_table(self) -> list[str]:
        """Lines of Markdown on how fast the variants decode; none where nothing was timed."""
        pasts = sorted({past for row in self.rows.values() for past in row.speeds})
        if not pasts:
            return []
        options = self.options
        lines = [
            f"Decoding with {options.threads} threads, medians of {2 * options.rounds} rounds of {options.new_tokens} "
            f"tokens in turn: tokens per second, and time and CPU time over those of {self.original}, ± the "
            "uncertainty of the median. Beside other work wall-clock time says little; look at the control, and at "
            "CPU time.",
            "",
            f"| | {' | '.join(f'after {past} | time | CPU time' for past in pasts)} |",
            f"|---|{'---|---|---|' * len(pasts)}",
        ]
        for name in (*(v.name for v in self.variants), self.control):
            speeds = self.rows[name].speeds if name in self.rows else {}
            if speeds:
                cells = [_cell(*speeds[past]) if past in speeds else " | | " for past in pasts]
                lines.append(f"| {name} | {' | '.join(cells)} |")
        return lines


def _cell(speed: float, ratio: float, by: float, cpu: float, cpu_by: float) -> str:
    return f"{speed:.1f} | {ratio:.2f} ± {by:.2f} | {cpu:.2f} ± {cpu_by:.2f}"


def arguments(description: str, work: str, pasts: Sequence[int]) -> argparse.ArgumentParser:
    """A parser with what all these benchmarks take."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(work), help="folder for graphs and results, kept")
    parser.add_argument("--source", type=Path, help="an export of SmolLM2 by export_smollm2.py")
    parser.add_argument("--tokenizer", type=Path, help="the folder of its tokenizer.json")
    parser.add_argument("--only", nargs="+", default=[], help="rows besides the original")
    parser.add_argument("--text", type=Path, help="text to judge with; default: graphopt's evaluation text")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--pasts", type=int, nargs="*", default=list(pasts), help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each of two sittings")
    parser.add_argument("--new-tokens", type=int, default=4, help="tokens of one round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", type=Path, help="write the tables there")
    return parser


def measured(
    decoder: Decoder,
    timed: Sequence[str],
    tables: Callable[[Decoder], Sequence[str]],
    put: Callable[[Path, str], None],
    recall: Callable[[], Callable[[Generator], float]] | None = None,
) -> int:
    """Make what is missing, measure, print, and write the page; the exit code.

    Args:
        decoder: The variants.
        timed: Those whose speed is measured.
        tables: Lines of Markdown of what was measured.
        put: Writes them into the page.
        recall: Makes what `Decoder.judge` is given, once the files are made.
    """
    try:
        decoder.make(timed)
        decoder.judge(None if recall is None else recall())
        decoder.time(timed)
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    text = "\n".join(tables(decoder))
    print(text)
    if (page := decoder.options.page) is not None:
        put(page, text)
    return 0
