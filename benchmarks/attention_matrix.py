"""Tiny transformers of many architectures by every exporter: which attentions does graphopt find, raise, leave, miss?

    python benchmarks/attention_matrix.py                                    the whole matrix
    python benchmarks/attention_matrix.py --models llama bert --variants all  a part, in more variants
    python benchmarks/attention_matrix.py --list                             models and variants

What is true is counted on the PyTorch side. Exports are kept in a folder and made once; making all of them takes about
half an hour on two cores, judging them some minutes. Exit status 1 where an attention softmax(q·kᵀ)·v is missed or a
number is off.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from matrix_judge import Outcome, judge
from matrix_page import page, table
from rich.console import Console

FOLDER = Path("build/attention-matrix")
LIMIT_SECONDS = 300
MEMORY_BYTES = 6 << 30


def main() -> int:
    """Parse the command line, make what is missing, judge, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", help="keys of the models (default: all)")
    parser.add_argument("--variants", nargs="*", help="names of variants, or all (default: the usual ones)")
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where exports and results are kept ({FOLDER})")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--resume", action="store_true", help="keep what the last run judged")
    parser.add_argument("--no-export", action="store_true", help="judge the exports that are there")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--page", type=Path, help="write the page to this file")
    parser.add_argument("--list", action="store_true", help="list models and variants, and stop")
    options = parser.parse_args()
    items = list(wanted(options.models, options.variants))
    if options.list:
        for item in items:
            print(item.model, item.variant)
        return 0
    exports = options.folder / "exports"
    if not options.no_export:
        make_exports(sorted({item.model for item in items}), options.variants, exports, options.jobs)
    before = read(options.folder / "results.jsonl") if options.resume else {}
    known = [before[key] for item in items if (key := (item.model, item.variant)) in before]
    fresh = judged([item for item in items if (item.model, item.variant) not in before], exports, options.jobs, known)
    order = {(item.model, item.variant): index for index, item in enumerate(items)}
    outcomes = sorted(fresh, key=lambda outcome: order[outcome.model, outcome.variant])
    if options.json:
        options.json.write_text(json.dumps([dataclasses.asdict(o) for o in outcomes], indent=1) + "\n")
    if options.page:
        options.page.write_text(page(outcomes, forms()))
    console = Console(width=None if sys.stdout.isatty() else 160)
    for part in table(outcomes):
        console.print(part)
    return int(any(outcome.bad for outcome in outcomes))


def forms() -> dict[str, str]:
    """What each model is an example of."""
    from matrix_models import MODELS

    return {key: model.form for key, model in MODELS.items()}


def wanted(models: Sequence[str] | None, variants: Sequence[str] | None) -> Iterator[Outcome]:
    """An empty outcome for every model and variant asked for."""
    import matrix_modules
    import matrix_texts  # noqa: F401
    from matrix_models import MODELS
    from matrix_variants import variants_of

    del matrix_modules
    for key in models or MODELS:
        if key not in MODELS:
            raise SystemExit(f"There is no model {key!r}; --list lists them.")
        for variant in variants_of(MODELS[key], variants):
            yield Outcome(key, variant.name, MODELS[key].sites, MODELS[key].others)


def place(folder: Path, outcome: Outcome) -> Path:
    """Where the export lies."""
    return folder / outcome.model.replace(":", "-") / f"{outcome.variant}.onnx"


def make_exports(models: Sequence[str], variants: Sequence[str] | None, folder: Path, jobs: int) -> None:
    """Make the exports that aren't there, in processes of their own: an exporter may bring its process down."""
    script = str(Path(__file__).with_name("matrix_exports.py"))
    more = [] if variants is None else ["--variants", *variants]

    def run(part: Sequence[str]) -> None:
        command = [sys.executable, script, "--folder", str(folder), "--models", *part, *more]
        while subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            pass  # what brought the process down is recorded, and the next one goes on behind it

    missing = [
        m for m in models if any(not place(folder, o).with_suffix(".json").exists() for o in wanted([m], variants))
    ]
    size = 6
    parts = [missing[i : i + size] for i in range(0, len(missing), size)]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, parts))


def judged(items: Sequence[Outcome], exports: Path, jobs: int, known: Sequence[Outcome]) -> Iterator[Outcome]:
    """The outcomes of the exports that are there; all, and what was `known` before, are noted as they come."""
    there = [item for item in items if place(exports, item).with_suffix(".json").exists()]
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context, initializer=limit) as pool,
        (exports.parent / "results.jsonl").open("w") as log,
    ):
        # In random order, so that what is there after a while is a sample of everything.
        mixed = random.Random(0).sample(there, len(there))
        futures = [pool.submit(judge_within, place(exports, item), item) for item in mixed]
        for outcome in itertools.chain(known, (done.result() for done in concurrent.futures.as_completed(futures))):
            log.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
            log.flush()
            yield outcome


def limit() -> None:
    """Hold this process to a size that no tiny model needs."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGALRM, _late)


def _late(*_: object) -> None:
    raise TimeoutError(f"it took more than {LIMIT_SECONDS} s")


def judge_within(path: Path, outcome: Outcome) -> Outcome:
    """`judge` within limits of time and memory."""
    signal.alarm(LIMIT_SECONDS)
    try:
        return judge(path, outcome)
    except (TimeoutError, MemoryError) as error:
        return dataclasses.replace(outcome, fault=f"failed: {type(error).__name__}: {error}")
    finally:
        signal.alarm(0)


def read(path: Path) -> dict[tuple[str, str], Outcome]:
    """The outcomes that a run noted, by model and variant."""
    if not path.exists():
        return {}
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return {(row["model"], row["variant"]): Outcome(**{**row, "nodes": tuple(row["nodes"])}) for row in rows}


if __name__ == "__main__":
    sys.exit(main())
