"""SmolLM2 with a smaller key/value cache, by every method alone and by some together.

    python benchmarks/kv.py --source model.onnx --tokenizer folder --page docs/kv.md
    python benchmarks/kv.py                                       exports the model first (export_smollm2.py)
    python benchmarks/kv.py --only "share-kv 3" --windows 2 --pasts 256 --rounds 3

All files are made from one export with the same assumptions; what is searched, refitted or calibrated sees the
calibration text of `graphopt.models.texts`. Perplexity and the mean divergence KL(original, variant) are over windows
of 512 tokens of its evaluation text. Recall: a sentence with a number of five digits stands somewhere in a text of 1024
tokens, and its beginning behind it; counted are the digits that greedy decoding gives right. Bytes of a token are those
that the generator's buffers grow by, in a cache of 4096 tokens. Speeds are measured as by `quantize_kv.py`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from decoder_judge import session_options
from export_smollm2 import export, load_module, save_tokenizer
from quantize_kv import ASSUMED, CONTROL, FLOAT, WINDOW, Row, cache_bytes, time_decoding

import graphopt
from graphopt.calibration.text import TextDataset, tokenize
from graphopt.errors import GraphoptError
from graphopt.models.texts import wikipedia
from graphopt.recipe import load as load_recipe
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.memory_session import release_memory
from graphopt.verification.quality.language import language_quality

CACHED = 4096
LONG, NEEDLES = 1024, 12
"""Tokens of a text in which a number is to be recalled, and how many such texts there are."""
AT_ONCE = 4
"""Variants that are judged beside the original at a time."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: What the row is called.
        how: What was done.
        passes: The passes behind the recipe canonical.
        behind: Those behind the recipe lower.
        pairs: The row whose pairs of layers are taken, instead of a search, and how many.
    """

    name: str
    how: str
    passes: tuple[dict[str, Any], ...] = ()
    behind: tuple[dict[str, Any], ...] = ()
    pairs: tuple[str, int] | None = None


def _shared(count: int, **options: Any) -> tuple[dict[str, Any], ...]:
    return ({"share-kv": {"count": count, "samples": 1, "looks": 4, **options}},)


MOST = 9
KV4 = ({"quantize-kv": {"key_bits": 4, "value_bits": 4}},)
STATIC = ({"quantize-kv": {"operator": "contrib"}},)
VARIANTS = (
    Variant(FLOAT, "float32, GroupQueryAttention"),
    Variant(f"share-kv {MOST}", f"{MOST} of 30 layers read another's cache, by loss, refitted", _shared(MOST)),
    Variant("share-kv 6", "the first 6 of these pairs, refitted", _shared(6), pairs=(f"share-kv {MOST}", 6)),
    Variant("share-kv 3", "the first 3 of these pairs, refitted", _shared(3), pairs=(f"share-kv {MOST}", 3)),
    *(Variant(f"{search} {count}", f"{count} layers, {search} caches (KVSharer{rule}), not refitted",
              _shared(count, search=search, heal=False))
      for search, rule in (("similar", " turned round"), ("dissimilar", "'s rule")) for count in (3, 6, 9)),
    Variant("one head", "one head of keys and values of three, refitted", ({"merge-kv-heads": {"heal": True}},)),
    Variant("one head, mean", "the same, the mean alone", ({"merge-kv-heads": {}},)),
    Variant("kv3", "3 bits", ({"quantize-kv": {"key_bits": 3, "value_bits": 3}},)),
    Variant("kv 3 by loss", "3 bits in the mean, by layer and part, by loss", ({"quantize-kv": {"budget": 3}},)),
    Variant("kv 3 by norms", "the same by norms", ({"quantize-kv": {"budget": 3, "sensitivity": "norms"}},)),
    Variant("int8", "8 bits, static scales, ONNX Runtime's operator", behind=STATIC),
    Variant("share-kv 3, kv4", "share-kv 3 and kv4", (*_shared(3), *KV4), pairs=(f"share-kv {MOST}", 3)),
    Variant("share-kv 3, int8", "share-kv 3 and int8", _shared(3), STATIC, (f"share-kv {MOST}", 3)),
    Variant("share-kv 9, int8", "share-kv 9 and int8", _shared(9), STATIC, (f"share-kv {MOST}", 9)),
)  # fmt: skip
TIMED = (FLOAT, "share-kv 3", "share-kv 6", "share-kv 9", "one head", "kv3", "int8", "share-kv 9, int8")


class Kept:
    """What was measured and found, in files of the folder for graphs, so that a run goes on where one ended."""

    def __init__(self, folder: Path) -> None:
        self._rows, self._more = folder / "rows.json", folder / "more.json"
        self.rows: dict[str, Row] = {}
        self.more: dict[str, dict[str, Any]] = json.loads(self._more.read_text()) if self._more.exists() else {}
        for name, data in (json.loads(self._rows.read_text()) if self._rows.exists() else {}).items():
            numbers = {key: {int(n): value for n, value in data[key].items()} for key in ("bytes", "speeds")}
            self.rows[name] = Row(**{**data, **numbers})

    def write(self) -> None:
        """Write them."""
        self._rows.write_text(json.dumps({name: dataclasses.asdict(row) for name, row in self.rows.items()}, indent=1))
        self._more.write_text(json.dumps(self.more, indent=1))


def main() -> int:
    """Make what is missing, measure, print, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("kv-cache-benchmark"), help="folder for the graphs, kept")
    parser.add_argument("--source", type=Path, help="an export of SmolLM2 by export_smollm2.py")
    parser.add_argument("--tokenizer", type=Path, help="the folder of its tokenizer.json")
    parser.add_argument("--only", nargs="+", default=[v.name for v in VARIANTS], help="rows besides the float cache")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--pasts", type=int, nargs="*", default=[256, 1024, 2048], help="tokens in the cache")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each of two sittings")
    parser.add_argument("--new-tokens", type=int, default=4, help="tokens of one round")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--page", type=Path, help="write the tables there")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    kept = Kept(options.work)
    try:
        files = graphs(options, kept)
        ids = tokenize(wikipedia("evaluation"), options.tokenizer)
        judge(files, kept, ids, options)
        for past in options.pasts:
            if not any(past in row.speeds for row in kept.rows.values()):
                time_decoding({name: files[name] for name in files if name in TIMED}, kept.rows, ids, past, options)
                kept.write()
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    text = "\n".join(tables(kept, options))
    print(text)
    if options.page is not None:
        options.page.write_text(PAGE.format(tables=text), encoding="utf-8")
    return 0


def graphs(options: argparse.Namespace, kept: Kept) -> dict[str, Path]:
    """The files by variant; made where they are missing."""
    if options.source is None:
        options.source = options.work / "export" / "model.onnx"
        options.tokenizer = options.tokenizer or options.work
        if not options.source.exists():
            export(load_module("sdpa"), options.source, "dynamo", 21)
            save_tokenizer(options.tokenizer)
    text = TextDataset(tokenize(wikipedia("calibration"), options.tokenizer), WINDOW)
    files: dict[str, Path] = {}
    for variant in VARIANTS:
        if variant.name not in (FLOAT, *options.only):
            continue
        files[variant.name] = target = options.work / f"{variant.name.replace(' ', '-').replace(',', '')}.onnx"
        if target.exists():
            continue
        begin = time.perf_counter()
        recipe = recipe_of(variant, kept)
        needs = any(getattr(one, "needs", ()) for one in load_recipe(recipe).passes())
        result = graphopt.optimize(
            options.source, recipe, assume=ASSUMED, verify="none", calibration=text if needs else None
        )
        seconds = time.perf_counter() - begin
        found: dict[str, Any] = {"seconds": seconds}
        for record in result.report.run.records:
            if record.status == "rolled back":
                print(f"{variant.name}: {record.name} {record.detail}", flush=True)
            found |= {key: record.options[key] for key in ("pairs", "sites") if record.options.get(key)}
        result.save(target, external_data=True)
        kept.more.setdefault(variant.name, {}).update(found)
        kept.write()
        print(f"{variant.name}: made in {seconds:.0f} s", flush=True)
        del result
        release_memory()
    return files


def recipe_of(variant: Variant, kept: Kept) -> dict[str, Any]:
    """The exact recipe with the passes of a variant in place."""
    passes = [{name: dict(options) for name, options in step.items()} for step in variant.passes]
    if variant.pairs is not None:
        name, count = variant.pairs
        pairs = kept.more.get(name, {}).get("pairs")
        if pairs is None:
            raise GraphoptError(f"{variant.name} takes the pairs of {name}, which must be made first.")
        passes = [{"share-kv": {"pairs": pairs[:count], "heal": True}}, *passes[1:]]
    return {"passes": [{"recipe": "canonical"}, *passes, {"recipe": "lower"}, *variant.behind]}


# ---- what it costs


def judge(files: dict[str, Path], kept: Kept, ids: npt.NDArray[np.int64], options: argparse.Namespace) -> None:
    """Fill in perplexity, divergence, recall and bytes."""
    missing = [name for name in files if name not in kept.rows or not kept.rows[name].bytes]
    if not missing:
        return
    original = Generator(files[FLOAT], sess_options=session_options(options.threads))
    needles = list(texts_with_needles(ids, options.tokenizer))
    for first in range(0, len(missing), AT_ONCE):
        names = missing[first : first + AT_ONCE]
        generators = [Generator(files[name], sess_options=session_options(options.threads)) for name in names]
        qualities = language_quality(original, generators, ids[: options.windows * WINDOW], WINDOW)
        for name, generator, found in zip(names, generators, qualities, strict=True):
            row = Row(found["ppl"], found["kl"], found["top1"], {CACHED: cache_bytes(generator, CACHED)})
            right = [digits_right(generator, prompt, wanted) for prompt, wanted in needles]
            kept.rows[name] = row
            kept.more.setdefault(name, {})["recall"] = float(np.mean(right))
            print(f"{name}: perplexity {row.perplexity:.3f}, KL {row.kl:.4f}, recall {np.mean(right):.0%}", flush=True)
        kept.write()
        del generators, generator
        release_memory()


def digits_right(generator: Generator, prompt: list[int], wanted: list[int]) -> float:
    """The part of the tokens of an answer that greedy decoding gives."""
    [made] = generator.generate([prompt], max_new_tokens=len(wanted), stop=())
    return sum(a == b for a, b in zip(made, wanted, strict=True)) / len(wanted)


def texts_with_needles(ids: npt.NDArray[np.int64], tokenizer: Path) -> list[tuple[list[int], list[int]]]:
    """Texts of `LONG` tokens with a sentence in them that ends in a number, and the tokens of the number."""
    made = []
    rng = np.random.default_rng(0)
    for index in range(NEEDLES):
        number = "".join(str(digit) for digit in rng.integers(0, 10, 5))
        asked = tokenize("\n\nThe secret number of the library is", tokenizer).tolist()
        answer = tokenize(f" {number}", tokenizer).tolist()
        stop = tokenize(".\n\n", tokenizer).tolist()
        room = LONG - 2 * len(asked) - len(answer) - len(stop)
        filler = ids[index * room : (index + 1) * room].tolist()
        place = int(room * (index + 0.5) / NEEDLES)
        made.append(([*filler[:place], *asked, *answer, *stop, *filler[place:], *asked], answer))
    return made


# ---- the page


def tables(kept: Kept, options: argparse.Namespace) -> list[str]:
    """The tables as lines of Markdown."""
    how = {variant.name: variant.how for variant in VARIANTS}
    whole = kept.rows[FLOAT].bytes[CACHED]
    pasts = sorted({past for row in kept.rows.values() for past in row.speeds})
    lines = [
        f"Perplexity and divergence over {options.windows} windows of {WINDOW} tokens of Wikipedia, recall in "
        f"{NEEDLES} texts of {LONG} tokens, bytes of a token in a cache of {CACHED} tokens. Decoding with "
        f"{options.threads} threads: time over that of the float cache, ± the uncertainty of the median, wall clock "
        "and CPU. Beside other work wall-clock time says little; look at the control, and at CPU time.",
        "",
        f"| | | perplexity | KL, nats | recall | bytes a token | of float | "
        f"{' | '.join(f'after {past} | CPU' for past in pasts)} |",
        f"|---|---|---|---|---|---|---|{'---|---|' * len(pasts)}",
    ]
    for name, row in kept.rows.items():
        speeds = [row.speeds.get(past) for past in pasts]
        times = " | ".join("| " if s is None else f"{s[1]:.2f} ± {s[2]:.2f} | {s[3]:.2f} ± {s[4]:.2f}" for s in speeds)
        if not row.bytes:
            if name == CONTROL:
                lines.append(f"| {name} | | | | | | | {times} |")
            continue
        size = row.bytes[CACHED]
        recall = kept.more.get(name, {}).get("recall", 0.0)
        lines.append(
            f"| {name} | {how[name]} | {row.perplexity:.3f} | {row.kl:.4f} | {recall:.0%} | {size / CACHED:,.0f} | "
            f"{size / whole:.1%} | {times} |"
        )
    pairs = kept.more.get(f"share-kv {MOST}", {}).get("pairs")
    if pairs:
        lines += ["", f"The pairs of share-kv {MOST}, [layer, donor] in the order in which they were found: `{pairs}`."]
    return lines


PAGE = """# A smaller key/value cache: SmolLM2

Made by `python benchmarks/kv.py --page docs/kv.md`; see [share-kv](passes/share-kv.md),
[merge-kv-heads](passes/merge-kv-heads.md) and [quantize-kv](passes/quantize-kv.md) for the passes.

```sh
graphopt optimize model.onnx --recipe share-kv --calibration text.txt --tokenizer folder
graphopt optimize model.onnx --recipe kv4 --assume max-length=8192
```

{tables}

- **share-kv** are layers that read the cache of an earlier one; a token's bytes fall with their number, and their
  projections of keys and values aren't computed. Nothing but ONNX Runtime's own operator is needed.
- **similar** and **dissimilar** order pairs of layers by the distance of their mean keys and values, as KVSharer does,
  and change no weight. On this model the rule of KVSharer, dissimilar first, isn't the better one.
- KVSharer reports 30 % less cache and generation at least 1.3 times as fast; the row share-kv 9 says what the same
  sharing gives here.
- **kv** rows use `QuantizedKVAttention`, **int8** ONNX Runtime's operator; the caches of both can be shared too.
"""


if __name__ == "__main__":
    sys.exit(main())
