"""The structure of a model in words: one line for each residual stream and each kind of site."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from graphopt.report import units

Data = Mapping[str, Any]

TOP_ROWS = 12
"""Streams, or names, that are told one by one."""

_PLACEMENTS = {
    "pre": "normalised before each branch",
    "post": "normalised after each addition",
    "sandwich": "normalised before and at the end of each branch",
    "both": "normalised before each branch and after each addition",
    "none": "not normalised",
}

_ROLES = {
    "token_ids": "tokens",
    "attention_mask": "mask",
    "position_ids": "positions",
    "use_cache": "flag",
    "logits": "logits",
}


def structure_lines(data: Data) -> list[str]:
    """What `graphopt.inspect` found, as lines of text."""
    return [*_streams(data), *_sites(data), *_cache(data)]


def _streams(data: Data) -> list[str]:
    """A line for each residual stream."""
    lines = []
    for stream in (data.get("residual_streams") or [])[:TOP_ROWS]:
        of = f" of {stream['features']} features" if stream["features"] else ""
        shortcuts = f", {units.plural(stream['shortcuts'], 'shortcut')} through a layer" if stream["shortcuts"] else ""
        ends = [f"{verb} {_counts(stream[key])}" for verb, key in (("written by", "writers"), ("read by", "readers"))
                if stream[key]]  # fmt: skip
        lines.append(
            f"residual stream: {units.plural(stream['layers'], 'layer')}{of}, {_PLACEMENTS[stream['placement']]}; "
            + "; ".join([f"branches: {_counts(stream['branches'])}{shortcuts}", *ends])
        )
    more = len(data.get("residual_streams") or []) - TOP_ROWS
    if more > 0:
        lines.append(f"and {units.plural(more, 'more residual stream')} (--json has all)")
    if skips := data.get("long_skips"):
        lines.append(f"{units.plural(len(skips), 'long skip')}: an earlier value is concatenated to a later one")
    if reason := data.get("no_residual_stream"):
        lines.append(f"residual stream: none ({reason})")
    return lines


def _sites(data: Data) -> list[str]:
    """Attention and linear sites, each on a line."""
    lines = []
    for kind in (data.get("attention") or {}).get("summary") or []:
        groups = f" on {kind['kv_heads']}" if kind.get("kv_heads") not in (None, kind["heads"]) else ""
        facts = [f"{kind['heads'] or '?'} heads{groups} of {kind['head_size'] or '?'}"]
        facts += ["rotated"] if kind.get("rotary") else []
        facts += [kind["mask"]] if kind.get("mask") else ["masked"] if kind["masked"] else []
        facts += ["with a cache"] if kind.get("cached") else []
        lines.append(f"attention: {kind['count']} × {', '.join(facts)} ({kind['operator']})")
    linear = data.get("linear") or {}
    if linear.get("roles"):
        shared = linear.get("shared") or []
        tied = f"; used in several places: {', '.join(shared[:TOP_ROWS])}" if shared else ""
        groups = units.plural(linear["groups"], "input")
        lines.append(f"linear layers: {_counts(linear['roles'])}, reading {groups}{tied}")
    if kinds := Counter(block["kind"] for block in data.get("convolutions") or []):
        lines.append(f"convolutional blocks: {_counts(kinds)}")
    if norms := data.get("elementwise_norms"):
        lines.append(f"norms without a reduction: {_counts(norms)}")
    return lines


def _cache(data: Data) -> list[str]:
    """The key/value cache of a decoder, on one line."""
    cache = data.get("kv_cache")
    if not cache:
        return []
    heads = f"{cache['heads'] or '?'} KV heads of {cache['head_size'] or '?'}"
    blocks = {pair["block_size"] for pair in cache["pairs"] if pair["part"] == "codes"}
    kind = [f"quantized in blocks of {size} tokens" for size in sorted(blocks)] or [
        cache["layout"] or "several layouts",
        cache["dtype"] or "several types",
    ]
    kind.append(f"by {_words(cache['operators'])}")
    kind.append("past and present may share one buffer" if cache["shared_buffer"] else "growing")
    roles = ", ".join(f"{words} {cache[key]!r}" for key, words in _ROLES.items() if cache[key])
    line = f"KV cache: {units.plural(cache['layers'], 'layer')} of {heads} ({', '.join(kind)}); {roles}"
    cross = len(cache["cross"])
    encoder = [f"and {units.plural(cross, 'input')} of keys and values of another sequence"] if cross else []
    return [" ".join([line, *encoder]), *(f"KV cache: {problem}" for problem in cache["problems"][:TOP_ROWS])]


def _words(names: list[str]) -> str:
    return " and ".join(names)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())
