"""SmolLM2 with its key/value cache quantized: what it costs in perplexity, what it saves in bytes, how fast it decodes.

    python benchmarks/quantize_kv.py --source model.onnx --tokenizer folder --page docs/quantize-kv.md
    python benchmarks/quantize_kv.py                          exports the model first (export_smollm2.py)
    python benchmarks/quantize_kv.py --only kv8 "GQA int8" --windows 2 --pasts 256 --rounds 3

All files are made by `graphopt optimize` from one export with the same assumptions. Perplexity, the mean divergence
KL(original, variant) and how often the most probable token is the original's are over windows of 512 tokens of the
evaluation text of `graphopt.models.texts`; static scales are calibrated on its calibration text. Bytes of the cache are
those of the generator's buffers. For the speed each system reads a prompt; then all decode in turn, a few tokens a
round, in another order each round, the first one twice, which shows the noise. Caches are shared buffers. That is done
in two sittings, in which the sessions are made in opposite order. What was measured is kept in the folder for graphs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from decoder_rows import WINDOW, Decoder, Variant, arguments, measured

FLOAT = "float cache"
FOUR = {"key_bits": 4, "value_bits": 4}
STATIC = "static scales, ONNX Runtime's operator"
VARIANTS = (
    Variant(FLOAT, "float32, GroupQueryAttention"),
    Variant("kv8", "8 bits", ({"quantize-kv": {}},)),
    Variant("kv8, keys rotated", "8 bits, keys after their rotation", ({"quantize-kv": {"rotate_at_read": False}},)),
    Variant("kv4", "4 bits", ({"quantize-kv": FOUR},)),
    Variant("kv4, keys rotated", "4 bits, keys after their rotation",
            ({"quantize-kv": {**FOUR, "rotate_at_read": False}},)),
    Variant("kv4, per token", "4 bits, keys per token", ({"quantize-kv": {**FOUR, "key_per_channel": False}},)),
    Variant("kv3", "3 bits", ({"quantize-kv": {"key_bits": 3, "value_bits": 3}},)),
    Variant("K4V2", "keys 4 bits, values 2", ({"quantize-kv": {"key_bits": 4, "value_bits": 2}},)),
    Variant("K2V4", "keys 2 bits, values 4", ({"quantize-kv": {"key_bits": 2, "value_bits": 4}},)),
    Variant("GQA int8", f"8 bits, {STATIC}", behind=({"quantize-kv": {"operator": "contrib"}},)),
    Variant("GQA int4", f"4 bits, {STATIC}", behind=({"quantize-kv": {"operator": "contrib", **FOUR}},)),
)  # fmt: skip
TIMED = (FLOAT, "kv8", "kv4", "kv3", "GQA int8", "GQA int4")


def main() -> int:
    """Make what is missing, measure, print, and write the page."""
    decoder = Decoder(VARIANTS, arguments(__doc__, "kv-benchmark", (256, 1024, 4096)).parse_args())

    def put(page: Path, text: str) -> None:
        page.write_text(PAGE.format(tables=text), encoding="utf-8")

    return measured(decoder, TIMED, tables, put)


def tables(decoder: Decoder) -> list[str]:
    """The tables as lines of Markdown."""
    whole = decoder.rows[FLOAT].bytes
    lines = [
        f"Perplexity, divergence and agreement over {decoder.options.windows} windows of {WINDOW} tokens of Wikipedia; "
        "bytes of a token in a cache of 4096 and of 32768 tokens, and their part of the float cache's.",
        "",
        "| | cache | perplexity | KL, nats | same token | bytes at 4096 | of float | bytes at 32768 | of float |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in decoder.shown().items():
        sizes = " | ".join(f"{row.bytes[n] / n:,.0f} | {row.bytes[n] / whole[n]:.1%}" for n in (4096, 32768))
        numbers = f"{row.perplexity:.3f} | {row.kl:.5f} | {row.agreement:.1%}"
        lines.append(f"| {name} | {decoder.how[name]} | {numbers} | {sizes} |")
    return [*lines, "", *decoder.speed_table()]


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
