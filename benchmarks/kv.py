"""SmolLM2 with a smaller key/value cache, by every method alone and by some together.

    python benchmarks/kv.py --source model.onnx --tokenizer folder --page docs/kv.md
    python benchmarks/kv.py                                       exports the model first (export_smollm2.py)
    python benchmarks/kv.py --only "share-kv 9" --windows 2 --pasts 256 --rounds 3

All files are made from one export with the same assumptions; what is searched, refitted or calibrated sees the
calibration text of `graphopt.models.texts`. Perplexity and the mean divergence KL(original, variant) are over windows
of 512 tokens of its evaluation text. Recall: a sentence with a number of five digits stands somewhere in a text of 1024
tokens, and its beginning behind it; counted are the digits that greedy decoding gives right. Bytes of a token are those
that the generator's buffers grow by, in a cache of 4096 tokens. Speeds are measured as by `quantize_kv.py`. What was
measured is kept in the folder for graphs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from decoder_rows import WINDOW, Decoder, Found, Steps, Variant, arguments, measured
from measured_page import circumstances, put_tables

from graphopt.calibration.text import tokenize
from graphopt.runtime_ops.generation import Generator

FLOAT = "float cache"
CACHED = 4096
LONG, NEEDLES = 1024, 12
"""Tokens of a text in which a number is to be recalled, and how many such texts there are."""
MOST = 9
DROPPED = ["attention.6", "attention.7", "attention.25"]
"""What a greedy search removes of three, see `depth.py`."""
FEW = 4
"""Tokens that are fed at a time where the tokens of one run see each other's keys and values whole."""


def _shared(count: int, **options: Any) -> Steps:
    return ({"share-kv": {"count": count, "samples": 1, "looks": 4, **options}},)


def _first(count: int) -> tuple[str, Callable[[Found], Steps]]:
    """The first pairs that the search found, refitted."""
    return f"share-kv {MOST}", lambda found: ({"share-kv": {"pairs": found["pairs"][:count], "heal": True}},)


KV4: Steps = ({"quantize-kv": {"key_bits": 4, "value_bits": 4}},)
STATIC: Steps = ({"quantize-kv": {"operator": "contrib"}},)
VARIANTS = (
    Variant(FLOAT, "float32, GroupQueryAttention"),
    Variant(f"share-kv {MOST}", f"{MOST} of 30 layers read another's cache, by loss, refitted", _shared(MOST)),
    Variant("share-kv 6", "the first 6 of these pairs, refitted", takes=_first(6)),
    Variant("share-kv 3", "the first 3 of these pairs, refitted", takes=_first(3)),
    *(Variant(f"{search} {count}", f"{count} layer{'s' * (count > 1)}, {search} caches (KVSharer{rule}), not refitted",
              _shared(count, search=search, heal=False))
      for search, rule in (("similar", " turned round"), ("dissimilar", "'s rule")) for count in (1, 3, 6, 9)),
    Variant("one head", "one head of keys and values of three, refitted", ({"merge-kv-heads": {"heal": True}},)),
    Variant("one head, mean", "the same, the mean alone", ({"merge-kv-heads": {}},)),
    Variant("kv8", "8 bits", ({"quantize-kv": {}},)),
    Variant("kv4", "4 bits", KV4),
    Variant("kv3", "3 bits", ({"quantize-kv": {"key_bits": 3, "value_bits": 3}},)),
    Variant("K4V2", "keys 4 bits, values 2", ({"quantize-kv": {"key_bits": 4, "value_bits": 2}},)),
    Variant("K2V4", "keys 2 bits, values 4", ({"quantize-kv": {"key_bits": 2, "value_bits": 4}},)),
    Variant("kv 3 by loss", "3 bits in the mean, by layer and part, by loss", ({"quantize-kv": {"budget": 3}},)),
    Variant("kv 3 by norms", "the same by norms", ({"quantize-kv": {"budget": 3, "sensitivity": "norms"}},)),
    Variant("int8", "8 bits, static scales, ONNX Runtime's operator", behind=STATIC),
    Variant("share-kv 3, kv4", "share-kv 3 and kv4",
            takes=(f"share-kv {MOST}", lambda found: (*_first(3)[1](found), *KV4))),
    Variant("share-kv 3, int8", "share-kv 3 and int8", behind=STATIC, takes=_first(3)),
    Variant(f"share-kv {MOST}, int8", f"share-kv {MOST} and int8", behind=STATIC, takes=_first(MOST)),
    Variant("3 attentions less, kv4", "drop-layers and kv4", ({"drop-layers": {"branches": DROPPED}}, *KV4)),
    Variant("low-rank-kv", "half of the channels of keys, three quarters of values, the last 32 tokens whole \\*",
            ({"low-rank-kv": {"window": 32}},), chunk=FEW),
    Variant("low-rank-kv, no window", "the same of all tokens", ({"low-rank-kv": {}},), chunk=FEW),
    Variant("low-rank-kv 2", "half of the channels of two layers together \\*",
            ({"low-rank-kv": {"layers": 2, "keys": 0.5, "values": 0.5}},), chunk=FEW),
    Variant("predict-kv", "2 bits, what earlier layers don't foretell \\*", ({"predict-kv": {}},), chunk=FEW),
    Variant("couple-kv", "2 bits, channels coupled by four \\*", ({"couple-kv": {}},), chunk=FEW),
)  # fmt: skip
TIMED = (FLOAT, "share-kv 3", "share-kv 6", "share-kv 9", "one head", "kv4", "kv3", "int8", "share-kv 9, int8")


def main() -> int:
    """Make what is missing, measure, print, and write the page."""
    options = arguments(__doc__, "kv-cache-benchmark", (256, 1024, 2048)).parse_args()
    decoder = Decoder(VARIANTS, options, keep=("pairs", "sites"))

    def recall() -> Callable[[Generator], float]:
        needles = list(texts_with_needles(decoder.evaluation(), options.tokenizer))
        return lambda generator: float(np.mean([digits_right(generator, *needle) for needle in needles]))

    return measured(
        decoder,
        TIMED,
        lambda decoder: [circumstances(), "", *tables(decoder)],
        lambda page, text: put_tables(page, "cache", text),
        recall,
    )


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


def tables(decoder: Decoder) -> list[str]:
    """The tables as lines of Markdown."""
    whole = decoder.rows[FLOAT].bytes[CACHED]
    lines = [
        f"Perplexity and divergence over {decoder.options.windows} windows of {WINDOW} tokens of Wikipedia, recall in "
        f"{NEEDLES} texts of {LONG} tokens, bytes of a token in a cache of {CACHED} tokens. \\*: the tokens of one run "
        f"see each other's keys and values whole; windows were fed {FEW} tokens at a time.",
        "",
        "| | | perplexity | KL, nats | recall | bytes a token | of float |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in decoder.shown().items():
        size = row.bytes[CACHED]
        numbers = f"{row.perplexity:.3f} | {row.kl:.4f} | {row.recall or 0:.0%}"
        lines.append(f"| {name} | {decoder.how[name]} | {numbers} | {size / CACHED:,.0f} | {size / whole:.1%} |")
    pairs = decoder.rows[f"share-kv {MOST}"].found.get("pairs") if f"share-kv {MOST}" in decoder.rows else None
    if pairs:
        lines += ["", f"The pairs of share-kv {MOST}, [layer, donor] in the order in which they were found: `{pairs}`."]
    return [*lines, "", *decoder.speed_table()]


if __name__ == "__main__":
    sys.exit(main())
