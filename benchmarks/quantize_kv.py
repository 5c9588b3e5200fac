"""SmolLM2 with its key/value cache quantized: what it costs in perplexity, what it saves in bytes, how fast it decodes.

    python benchmarks/quantize_kv.py --source model.onnx --tokenizer folder --page docs/quantize-kv.md
    python benchmarks/quantize_kv.py                          exports the model first (export_smollm2.py)
    python benchmarks/quantize_kv.py --only kv8 "GQA int8" --windows 2 --pasts 256 --rounds 3

All files are made by `graphopt optimize` from one export with the same assumptions. Perplexity, the mean divergence
KL(original, variant) and how often the most probable token is the original's are over windows of 512 tokens of the
evaluation text of `graphopt.models.texts`; static scales are calibrated on its calibration text. Bytes of the cache are
those of the generator's buffers. For the speed each system reads a prompt; then all decode in turn, a few tokens a
round, in another order each round, the first one twice, which shows the noise. Caches are shared buffers. That is done
in two sittings, in which the sessions are made in opposite order.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import yaml
from decoder_judge import session_options
from export_smollm2 import export, load_module, save_tokenizer
from timed_session import timed_options

import graphopt
from graphopt.analysis.interleaved import Ratio
from graphopt.calibration.text import TextDataset, tokenize
from graphopt.errors import GraphoptError
from graphopt.models.texts import wikipedia
from graphopt.recipe import shipped
from graphopt.runtime_ops.decoding import empty_shape
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.memory_session import release_memory
from graphopt.verification.quality.language import language_quality

WINDOW = 512
ASSUMED = ("no-left-padding", "no-batched-chunks", "counted-positions", "max-length=8192")
FLOAT = "float cache"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: What the row is called.
        how: How the cache is stored.
        options: Options of quantize-kv; None: the pass isn't run.
    """

    name: str
    how: str
    options: dict[str, Any] | None


FOUR = {"key_bits": 4, "value_bits": 4}
STATIC = "static scales, ONNX Runtime's operator"
VARIANTS = (
    Variant(FLOAT, "float32, GroupQueryAttention", None),
    Variant("kv8", "8 bits", {}),
    Variant("kv8, keys rotated", "8 bits, keys after their rotation", {"rotate_at_read": False}),
    Variant("kv4", "4 bits", FOUR),
    Variant("kv4, keys rotated", "4 bits, keys after their rotation", {**FOUR, "rotate_at_read": False}),
    Variant("kv4, per token", "4 bits, keys per token", {**FOUR, "key_per_channel": False}),
    Variant("kv3", "3 bits", {"key_bits": 3, "value_bits": 3}),
    Variant("K4V2", "keys 4 bits, values 2", {"key_bits": 4, "value_bits": 2}),
    Variant("K2V4", "keys 2 bits, values 4", {"key_bits": 2, "value_bits": 4}),
    Variant("GQA int8", f"8 bits, {STATIC}", {"operator": "contrib"}),
    Variant("GQA int4", f"4 bits, {STATIC}", {"operator": "contrib", **FOUR}),
)
TIMED = (FLOAT, "kv8", "kv4", "kv3", "GQA int8", "GQA int4")


@dataclasses.dataclass
class Row:
    """What was measured of a variant.

    Attributes:
        perplexity: Over all windows.
        kl: Mean of KL(original, variant) in nats.
        agreement: Part of the tokens after which the most probable one is the original's.
        bytes: Of the cache by number of tokens.
        speeds: (tokens per second, ratio of times to those of the float cache, its uncertainty, ratio of CPU times, its
            uncertainty) by tokens in the cache.
    """

    perplexity: float = 0.0
    kl: float = 0.0
    agreement: float = 0.0
    bytes: dict[int, int] = dataclasses.field(default_factory=dict)
    speeds: dict[int, tuple[float, float, float, float, float]] = dataclasses.field(default_factory=dict)


class Kept:
    """The rows, in a file of the folder for graphs, so that `--resume` goes on where a run ended."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.file = options.work / "results.json"
        self.rows: dict[str, Row] = {}
        if options.resume and self.file.exists():
            for name, data in json.loads(self.file.read_text()).items():
                numbers = {key: {int(n): value for n, value in data[key].items()} for key in ("bytes", "speeds")}
                self.rows[name] = Row(**{**data, **numbers})

    def write(self) -> None:
        """Write them."""
        self.file.write_text(json.dumps({name: dataclasses.asdict(row) for name, row in self.rows.items()}, indent=1))


def main() -> int:
    """Make what is missing, measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("kv-benchmark"), help="folder for the graphs, kept")
    parser.add_argument("--source", type=Path, help="an export of SmolLM2 by export_smollm2.py")
    parser.add_argument("--tokenizer", type=Path, help="the folder of its tokenizer.json")
    parser.add_argument("--only", nargs="+", default=[v.name for v in VARIANTS], help="rows besides the float cache")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--pasts", type=int, nargs="*", default=[256, 1024, 4096], help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each of two sittings")
    parser.add_argument("--new-tokens", type=int, default=4, help="tokens of one round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--resume", action="store_true", help="keep what an earlier run with the same options measured")
    parser.add_argument("--page", type=Path, help="write the tables there")
    options = parser.parse_args()
    try:
        files = graphs(options)
        ids = tokenize(wikipedia("evaluation"), options.tokenizer)
        kept = Kept(options)
        judge(files, kept, ids[: options.windows * WINDOW], options.threads)
        for past in options.pasts:
            if not any(past in row.speeds for row in kept.rows.values()):
                time_decoding({name: files[name] for name in files if name in TIMED}, kept.rows, ids, past, options)
                kept.write()
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    text = "\n".join(tables(kept.rows, options))
    print(text)
    if options.page is not None:
        options.page.write_text(PAGE.format(tables=text), encoding="utf-8")
    return 0


def graphs(options: argparse.Namespace) -> dict[str, Path]:
    """The files by variant; made where they are missing."""
    work = options.work
    if options.source is None:
        options.source = work / "export" / "model.onnx"
        options.tokenizer = options.tokenizer or work
        if not options.source.exists():
            export(load_module("sdpa"), options.source, "dynamo", 21)
            save_tokenizer(options.tokenizer)
    files = {}
    calibration: TextDataset | None = None
    for variant in VARIANTS:
        if variant.name not in (FLOAT, *options.only):
            continue
        files[variant.name] = target = work / f"{variant.name.replace(' ', '-').replace(',', '')}.onnx"
        if target.exists():
            continue
        begin = time.perf_counter()
        recipe = recipe_of(variant)
        static = variant.options is not None and "operator" in variant.options
        if static and calibration is None:
            calibration = TextDataset(tokenize(wikipedia("calibration"), options.tokenizer), WINDOW)
        result = graphopt.optimize(
            options.source, recipe, assume=ASSUMED, verify="none", calibration=calibration if static else None
        )
        left = {detail for _, site in result.report.run.left() if "Attention" in (detail := site.detail)}
        result.save(target, external_data=True)
        print(
            f"{variant.name}: made in {time.perf_counter() - begin:.0f} s{'; '.join(['', *sorted(left)])}", flush=True
        )
        del result
        release_memory()
    return files


def recipe_of(variant: Variant) -> dict[str, Any]:
    """The exact recipe with quantize-kv in place."""
    data: dict[str, Any] = yaml.safe_load(shipped()["exact"])
    if variant.options is not None:
        place = data["passes"].index("group-query-attention") + ("operator" in variant.options)
        data["passes"].insert(place, {"quantize-kv": variant.options})
    return data


# ---- what it costs


def judge(files: dict[str, Path], results: Kept, ids: npt.NDArray[np.int64], threads: int) -> None:
    """Fill in perplexity, divergence, agreement and bytes."""
    missing = [name for name in files if name not in results.rows]
    if not missing:
        return
    original = Generator(files[FLOAT], sess_options=session_options(threads))
    for name in missing:
        generator = Generator(files[name], sess_options=session_options(threads))
        [found] = language_quality(original, [generator], ids, WINDOW)
        sizes = {tokens: cache_bytes(generator, tokens) for tokens in (512, 4096, 32768)}
        row = Row(found["ppl"], found["kl"], found["top1"], sizes)
        results.rows[name] = row
        results.write()
        print(f"{name}: perplexity {row.perplexity:.3f}, KL {row.kl:.5f}, same {row.agreement:.2%}", flush=True)
        del generator
        release_memory()


def cache_bytes(generator: Generator, tokens: int) -> int:
    """Bytes of the buffers for one row of so many tokens."""
    pairs = generator.interface.pairs
    return sum(math.prod(empty_shape(pair, 1, tokens)) * int(ir.DataType[pair.dtype].itemsize) for pair in pairs)


# ---- how fast it is


def time_decoding(
    files: dict[str, Path], rows: dict[str, Row], ids: npt.NDArray[np.int64], past: int, options: argparse.Namespace
) -> None:
    """Fill in the speed with `past` tokens in the cache, and that of the float cache once more as the control."""
    names = [*files, CONTROL]
    wall: list[list[float]] = [[] for _ in names]
    cpu: list[list[float]] = [[] for _ in names]
    # Of the sessions of a process the later ones run faster, whatever they are: each is made both early and late.
    for order in (range(len(names)), reversed(range(len(names)))):
        running: dict[int, list[Any]] = {}
        for index in order:
            generator = Generator(files.get(names[index], files[FLOAT]), sess_options=timed_options(options.threads))
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
        rows.setdefault(name, Row()).speeds[past] = numbers
        print(f"{name} after {past}: {speed:.1f} tokens/s, time {ratio.median:.2f}, CPU {work.median:.2f}", flush=True)


CONTROL = f"{FLOAT} (control)"


# ---- the page


def tables(rows: dict[str, Row], options: argparse.Namespace) -> list[str]:
    """The tables as lines of Markdown."""
    how = {variant.name: variant.how for variant in VARIANTS}
    whole = rows[FLOAT].bytes
    lines = [
        f"Perplexity, divergence and agreement over {options.windows} windows of {WINDOW} tokens of Wikipedia; bytes "
        "of a token in a cache of 4096 and of 32768 tokens, and their part of the float cache's.",
        "",
        "| | cache | perplexity | KL, nats | same token | bytes at 4096 | of float | bytes at 32768 | of float |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if not row.bytes:
            continue
        sizes = " | ".join(f"{row.bytes[n] / n:,.0f} | {row.bytes[n] / whole[n]:.1%}" for n in (4096, 32768))
        lines.append(f"| {name} | {how[name]} | {row.perplexity:.3f} | {row.kl:.5f} | {row.agreement:.1%} | {sizes} |")
    if options.pasts:
        lines += [
            "",
            f"Decoding with {options.threads} threads, medians of {2 * options.rounds} rounds of {options.new_tokens} "
            "tokens in turn: tokens per second, and time and CPU time over those of the float cache, ± the uncertainty "
            "of the median. Beside other work wall-clock time says little; look at the control, and at CPU time.",
            "",
            f"| | {' | '.join(f'after {past} | time | CPU time' for past in options.pasts)} |",
            f"|---|{'---|---|---|' * len(options.pasts)}",
        ]
    for name, row in rows.items():
        if row.speeds:
            cells = [
                f"{speed:.1f} | {ratio:.2f} ± {by:.2f} | {cpu:.2f} ± {cpu_by:.2f}"
                for speed, ratio, by, cpu, cpu_by in row.speeds.values()
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


PAGE = """# A quantized key/value cache: SmolLM2

Made by `python benchmarks/quantize_kv.py --page docs/quantize-kv.md`; see [quantize-kv](passes/quantize-kv.md) for the
pass and [Generate text](generation.md) for what the cache is to a program that runs the model.

```sh
graphopt optimize model.onnx --recipe kv8 --assume max-length=8192
graphopt optimize model.onnx --recipe kv4 --assume max-length=8192
```

{tables}

- **kv8** and **kv4** are the recipes: keys per channel in blocks of 32 tokens, stored before their rotation, values per
  token, the newest 32 to 63 tokens in half precision. Nothing is calibrated.
- **GQA int8** and **int4** are the variant without custom operators: ONNX Runtime's GroupQueryAttention with one static
  scale for each channel, symmetric, from 8 windows of another text (`quantize-kv: {{operator: contrib}}` behind
  group-query-attention, and `--calibration`).
- The bytes at 4096 tokens count the ring of unquantized tokens, which a longer context outweighs.
- Windows of 512 tokens end with 32 to 63 unquantized ones, so short texts lose less than long ones.
"""


if __name__ == "__main__":
    sys.exit(main())
