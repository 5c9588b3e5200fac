"""SmolLM2 with tokens dropped from its cache, by every rule: what is recalled, and what a continuation loses.

    python benchmarks/evict_kv.py --model decoder.onnx --tokenizer folder --page docs/kv.md

`--model` is an export by `export_smollm2.py` that went through the recipe evictable-kv. Recall is measured as by
`kv.py`: a sentence with a number somewhere in a text of 1024 tokens, and its beginning again at the end. Continuations
are of the evaluation text of `graphopt.models.texts`: behind each prompt of 512 tokens, of which some are dropped then,
64 tokens of the text are read; perplexity and KL(all tokens, some dropped) are over what the model says behind each of
them. Prompts are read once, and each rule goes on from there.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from decoder_judge import session_options
from kv import LONG, NEEDLES, texts_with_needles
from measured_page import circumstances, put_tables

from graphopt.calibration.text import tokenize
from graphopt.errors import GraphoptError, UsageError
from graphopt.models.texts import wikipedia
from graphopt.runtime_ops.decoding import Decoding
from graphopt.runtime_ops.eviction import Eviction, Evictor, drop
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.scoring import log_sums

PROMPT, CONTINUED = 512, 64
PARTS = (0.5, 0.25, 0.1)
RULES = {
    "first and last tokens": {"sinks": 4},
    "uniform": {},
    "prefix (PrefixKV)": {"allocation": "prefix"},
    "uncertainty (ZigZagKV)": {"allocation": "uncertainty"},
    "dynamic (DynamicKV)": {"allocation": "dynamic"},
    "chunks of 8 (ChunkKV)": {"chunk": 8},
    "chunks of 8, 2 layers alike (ChunkKV)": {"chunk": 8, "reuse": 2},
    "chunks of 8, prefix": {"chunk": 8, "allocation": "prefix"},
    "chunks of 8, uncertainty": {"chunk": 8, "allocation": "uncertainty"},
    "chunks of 8, dynamic": {"chunk": 8, "allocation": "dynamic"},
}


@dataclasses.dataclass
class Row:
    """What one rule gave.

    Attributes:
        right: The part of the digits, of each text.
        surprise: −ln p of each token of the continuations.
        divergence: KL of each of them, in nats.
        kept: The fewest and the most tokens that a layer kept of a prompt of 512, the last of them.
    """

    right: list[float] = dataclasses.field(default_factory=list)
    surprise: list[float] = dataclasses.field(default_factory=list)
    divergence: list[float] = dataclasses.field(default_factory=list)
    kept: tuple[int, int] = (0, 0)


def main() -> int:
    """Measure, print, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="made by the recipe evictable-kv")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the folder of its tokenizer.json")
    parser.add_argument("--texts", type=int, default=8, help="continuations")
    parser.add_argument("--needles", type=int, default=NEEDLES, help="texts with a number, at most those of kv.py")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--page", type=Path, help="write the table there, between its marks")
    options = parser.parse_args()
    try:
        generator = Generator(options.model, sess_options=session_options(options.threads))
        ids = tokenize(wikipedia("evaluation"), options.tokenizer)
        rows: dict[str, Row] = {}
        whole = len(ids) // (PROMPT + CONTINUED + 1)
        for text in ids[: min(options.texts, whole) * (PROMPT + CONTINUED + 1)].reshape(-1, PROMPT + CONTINUED + 1):
            continued(generator, text, rows)
        needles = texts_with_needles(ids, options.tokenizer)
        for prompt, answer in needles[:: max(1, NEEDLES // options.needles)]:
            recalled(generator, np.array(prompt), answer, rows)
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    text = "\n".join(table(rows, options))
    print(text)
    if options.page is not None:
        put_tables(options.page, "eviction", text)
    return 0


def variants(generator: Generator, prompt: npt.NDArray[np.int64]) -> Iterator[tuple[str, Decoding, int]]:
    """By the name of its row, each rule's decoder behind a prompt, and the token that it would write first."""
    decoding = generator.start(1, len(prompt))
    # A budget of all tokens drops none, and the end of the prompt tells what matters.
    logits = generator.prefill(decoding, prompt[None], evictor=Evictor(decoding, Eviction(1.0), generator.name))
    first = int(np.argmax(logits[0]))
    yield "all tokens", decoding.fork(), first
    for part in PARTS:
        for name, settings in RULES.items():
            recent = round(part * len(prompt)) - 4 if name == "first and last tokens" else 32
            fork = decoding.fork()
            drop(fork, Eviction(part, recent=recent, **settings), decoding.told)
            yield f"{part:.0%} | {name}", fork, first


def recalled(generator: Generator, prompt: npt.NDArray[np.int64], answer: list[int], rows: dict[str, Row]) -> None:
    """Whether greedy decoding behind a prompt gives an answer. Its first token, a space, was known before any token was
    dropped, so that it doesn't count."""
    for name, decoding, first in variants(generator, prompt):
        made = [first]
        while len(made) < len(answer):
            made.append(int(np.argmax(decoding.feed(np.array([[made[-1]]]))[0, -1])))
        right = [a == b for a, b in zip(made[1:], answer[1:], strict=True)]
        rows.setdefault(name, Row()).right.append(float(np.mean(right)))


def continued(generator: Generator, text: npt.NDArray[np.int64], rows: dict[str, Row]) -> None:
    """What a model says behind each token of a continuation."""
    given, following = text[PROMPT:-1], text[PROMPT + 1 :]
    whole: npt.NDArray[np.float64] | None = None
    for name, decoding, _ in variants(generator, text[:PROMPT]):
        lengths = [value.shape()[2] for value in decoding.caches.values()]
        logits = np.asarray(decoding.feed(given[None])[0], dtype=np.float64)
        if len(logits) != CONTINUED:
            raise UsageError(f"{generator.name} gives logits for the last token only.")
        logs = logits - log_sums(logits)[:, None]
        whole = logs if whole is None else whole
        row = rows.setdefault(name, Row())
        row.kept = min(lengths), max(lengths)
        row.surprise += (-logs[np.arange(CONTINUED), following]).tolist()
        row.divergence += (np.exp(whole) * (whole - logs)).sum(axis=1).tolist()


def table(rows: dict[str, Row], options: argparse.Namespace) -> list[str]:
    """The lines of a table in Markdown."""
    count = len(next(iter(rows.values())).surprise) // CONTINUED
    texts = len(next(iter(rows.values())).right)
    lines = [
        f"{circumstances()} {count} continuations of {CONTINUED} tokens behind prompts of {PROMPT}; recall in {texts} "
        f"texts of {LONG} tokens (`python benchmarks/evict_kv.py`).",
        "",
        "| tokens kept | rule | perplexity | KL, nats | recall | in one layer, of 512 |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        part, _, rule = name.partition(" | ")
        lines.append(
            f"| {part} | {rule} | {np.exp(np.mean(row.surprise)):.2f} | {np.mean(row.divergence):.4f} | "
            f"{np.mean(row.right):.0%} | {row.kept[0]} to {row.kept[1]} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
