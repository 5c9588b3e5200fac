"""The page of the attention benchmark, from its results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import zoo_page
from decoder_domain import CASES, TOLERANCE
from tools import BUILDER, GENAI
from zoo_page import noise, ratio

Results = dict[str, Any]
ASSUMING = "graphopt assuming"


def page(data: Results) -> str:
    """The whole page as Markdown."""
    decoders = {**data, "models": [model for model in data["models"] if "source" in model]}
    encoders = {**data, "models": [model for model in data["models"] if "source" not in model]}
    encoders["versions"] = {n: v for n, v in data["versions"].items() if n not in (ASSUMING, BUILDER, GENAI)}
    parts = [_head(data), _summary(decoders, encoders)]
    for title, some in (("# SmolLM2 with its cache", decoders), ("# Encoders", encoders)):
        if some["models"]:
            parts += [iter([f"#{title}", ""]), _lower(_section(some))]
    return "\n".join([*(line for part in parts for line in part), *zoo_page.faults(data)])


def _section(data: Results) -> Iterator[str]:
    decoding = "source" in data["models"][0]
    if decoding:
        yield from _sources(data)
    yield from zoo_page.table(
        data,
        "Attention found",
        "Nodes of the file, and its attention operators; a Softmax is an attention that is spelled out.",
        _operators,
        _operators,
    )
    if decoding:
        yield from zoo_page.table(
            data,
            "Calls answered alike",
            f"Of {len(CASES)} calls (batch 1 and 3 × prompt, step, chunk × padding none, left, right) those with "
            f"logits within {TOLERANCE:g} of the original's largest, and the largest difference among them.",
            lambda _: "",
            _calls,
        )
        yield from zoo_page.table(
            data,
            "Perplexity",
            f"Over {data['windows'] * data['window']:,} tokens of Wikipedia that nothing was tuned on, in windows of "
            f"{data['window']}.",
            _perplexity,
            _perplexity,
        )
        yield from _speeds(data)
    yield from zoo_page.times(zoo_page.by_wall_clock(data), "wall-clock")
    yield from zoo_page.times(data)


def _lower(lines: Iterator[str]) -> Iterator[str]:
    """Headings one level further down."""
    return (f"#{line}" if line.startswith("#") else line for line in lines)


def _head(data: Results) -> Iterator[str]:
    where = data["environment"]
    versions = [f"{name} {version or '(not installed)'}" for name, version in data["versions"].items()]
    yield "# Attention"
    yield ""
    yield (
        "Decoders and encoders from several exporters through graphopt, through its peers with their defaults, and "
        "beside the graph that onnxruntime-genai's model builder makes by hand. `make bench-attention` installs the "
        "peers, exports the sources, measures everything and writes this page and `attention.json` beside it."
    )
    yield ""
    yield (
        f"Measured on {where['date']} with ONNX Runtime {where['onnxruntime']}, {where['threads']} thread"
        f"{'s' * (where['threads'] != 1)} of {where['processor']}; {', '.join(versions)}. graphopt assuming: with "
        f"{' '.join(f'`--assume {text}`' for text in data['assumed'])}, and judged on the calls that this allows; "
        "onnxscript for ORT: `optimize_for_ort`; ORT transformers: `onnxruntime.transformers.optimizer`; genai graph: "
        "the builder's fp32 file, run like all the others by graphopt's generator in a plain session; genai: the same "
        "file in onnxruntime-genai's own generator."
    )
    yield ""
    yield (
        "In each round every file runs once, in another order each time, and the original once more as a control. A "
        "decoder runs a prompt with an empty cache, then the tokens after it one at a time, each the most probable "
        "one. Past and present share one buffer where the graph has GroupQueryAttention throughout; else each step "
        "gives out a new cache, which is handed on without a copy."
    )
    yield ""


def _summary(decoders: Results, encoders: Results) -> Iterator[str]:
    for name in ("graphopt", ASSUMING):
        for model in decoders["models"]:
            found = model["tools"].get(name, {})
            if "errors" in found:
                answered = f"{_calls(found)} of {len(CASES)} calls answered alike"
                score = f"perplexity {_perplexity(found)} of {_perplexity(model['original'])}"
                yield f"- {model['model']}, {name}: {_operators(found)}; {answered}; {score}."
        for model, timing in _timings(decoders):
            if name in timing["ratios"] and GENAI in timing["ratios"]:
                wall, cpu = (ratio(t["ratios"][name]) / ratio(t["ratios"][GENAI]) for t in (timing["wall"], timing))
                yield (
                    f"- {model['model']}, {timing['workload']}: {name} takes {wall:.2f} of genai's wall-clock time, "
                    f"{cpu:.2f} of its CPU time (noise {noise(timing['wall'], name):.2f}, {noise(timing, name):.2f})."
                )
    for name, every in (("graphopt", [*_timings(decoders), *_timings(encoders)]), (ASSUMING, _timings(decoders))):
        back = [f"{_label(m, t)} ({peer})" for m, t in every if (peer := zoo_page.behind(m, t, name))]
        yield (
            f"- {name}: the best equal peer is ahead beyond the noise of the CPU time on {len(back)} of {len(every)}: "
            f"{', '.join(back) or 'none'}."
        )
    if missing := decoders["not_measured"]:
        yield f"- Not measured in this run: {', '.join(missing)}."
    yield ""


def _timings(data: Results) -> list[tuple[Results, Results]]:
    return [(model, timing) for model in data["models"] for timing in model["timings"]]


def _label(model: Results, timing: Results) -> str:
    return " ".join(filter(None, (model["model"], timing["workload"])))


def _sources(data: Results) -> Iterator[str]:
    yield "## Sources"
    yield ""
    yield "What the export script found of its own file against PyTorch."
    yield ""
    for model in data["models"]:
        yield f"- {model['model']} ({model['use']}): {model['source']}"
    yield f"- {BUILDER}: {data['models'][0]['builder']}"
    yield ""


def _operators(found: Results) -> str:
    if found.get("nodes") is None:
        return "–"
    names = [f"{count} {name.rsplit('.', 1)[-1]}" for name, count in sorted(found.get("attention", {}).items())]
    return f"{found['nodes']}: {', '.join(names) or 'none'}"


def _calls(found: Results) -> str:
    if "errors" not in found:
        return "–"
    good = [error for error in found["errors"].values() if isinstance(error, float) and error <= TOLERANCE]
    refused = sum(isinstance(error, str) for error in found["errors"].values())
    return f"{len(good)}, {max(good, default=0):.0e}" + (f" ({refused} refused)" if refused else "")


def _perplexity(found: Results) -> str:
    return f"{found['perplexity']:.4f}" if "perplexity" in found else "–"


def _speeds(data: Results) -> Iterator[str]:
    names = list(data["versions"])
    yield "## Tokens per second"
    yield ""
    yield "By wall-clock time; in brackets how many of the tokens chosen are the original's before the first other one."
    yield ""
    yield f"| | original | {' | '.join(names)} |"
    yield "|---|---|" + "---|" * len(names)
    for model, timing in _timings(data):
        wall = timing["wall"]
        speed = timing["tokens"] / wall["original_ms"] * 1e3
        cells = [
            f"{speed / ratio(wall['ratios'][name]):.0f} ({timing['agreed'][name]})" if name in wall["ratios"] else "–"
            for name in names
        ]
        yield f"| {_label(model, timing)} | {speed:.0f} | {' | '.join(cells)} |"
    yield ""
