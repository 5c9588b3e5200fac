"""Caches taken out of a decoder: inputs and outputs that nothing needs any more go, and the others move up."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence

import onnx_ir as ir

from graphopt.graph.importance import IMPORTANCE_KEY, Importance, note_importance, read_importance
from graphopt.graph.kept_layers import note_kept
from graphopt.graph.kv_interface import CachePair, KVInterface
from graphopt.graph.kv_names import RENAMED_KEY, original_names, rename_ends, rename_in_assumptions


def remove_pairs(model: ir.Model, interface: KVInterface, gone: Collection[CachePair]) -> dict[str, str]:
    """Remove caches that no attention reads or writes any more, and close the gaps in the numbers of the others.

    Whoever asks for the shape of a removed cache is told that of one that is left.

    Args:
        model: The decoder, in which the attentions of `gone` have been rewritten.
        interface: Its interface before that.
        gone: The pairs of it that go.

    Returns:
        Name before → name now, of the inputs and outputs that got another.

    Raises:
        ValueError: A removed cache is still read, or a removed present is still needed within the graph.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    kept = [pair for pair in interface.pairs if pair not in gone]
    for pair in gone:
        past = inputs[pair.past]
        if past.uses():
            _answer_by_another(past, (inputs[other.past] for other in kept if other.part == pair.part))
    return forget_pairs(model, interface, gone)


def forget_pairs(model: ir.Model, interface: KVInterface, gone: Collection[CachePair]) -> dict[str, str]:
    """Take caches from the inputs and outputs of a model in which nothing reads them, and renumber the others.

    The importance of cached tokens is told of the layers that are left, by their numbers then.

    Args:
        model: The decoder, without the outputs for the importance of tokens in layers of which nothing is left.
        interface: Its interface before.
        gone: The pairs of it that go.

    Returns:
        Name before → name now, of the inputs and outputs that got another.
    """
    graph = model.graph
    pasts, presents = {pair.past for pair in gone}, {pair.present for pair in gone if pair.present is not None}
    graph.inputs[:] = [value for value in graph.inputs if value.name not in pasts]
    graph.outputs[:] = [value for value in graph.outputs if value.name not in presents]
    left = [pair for pair in interface.pairs if pair.past not in pasts]
    note_kept(model, (pair.layer for pair in interface.pairs), (pair.layer for pair in left))
    stays = {pair.part: pair.past for pair in reversed(left)}
    rename_in_assumptions(model, {pair.past: stays.get(pair.part, pair.past) for pair in gone})
    _renumber_importance(model, [pair.layer for pair in left])
    return close_gaps(model, interface, pasts | presents)


def close_gaps(model: ir.Model, before: KVInterface, gone: Collection[str]) -> dict[str, str]:
    """Renumber the inputs and outputs of a cache after some of them were removed, in the exporter's own pattern.

    Where the numbers of a name differ between layers in one place, that is the layer's; it is lowered by as many as
    there were removed below it. So `past_key_values.7.key` becomes `past_key_values.6.key` where one below was removed,
    and numbers that had gaps before keep those. Names that hold no such number stay.

    Args:
        model: The model, without what was removed.
        before: Its interface before.
        gone: Names of the inputs and outputs that were removed.

    Returns:
        Name before → name now, of those that changed. The model remembers them, as `rename_kv_cache` does.
    """
    changed: dict[str, str] = {}
    pairs = [*before.pairs, *before.cross]
    for names in ([p.past for p in pairs], [p.present for p in pairs]):
        numbered = [(pair.part, *_parts(name)) for pair, name in zip(pairs, names, strict=True) if name is not None]
        alike: dict[tuple[str, tuple[str, ...]], list[tuple[str, ...]]] = {}
        for part, words, numbers in numbered:
            alike.setdefault((part, words), []).append(numbers)
        lost = [(words, numbers) for _, words, numbers in numbered if _joined(words, numbers) in gone]
        for part, words, numbers in numbered:
            place = _varying(alike[part, words])
            if place is None or _joined(words, numbers) in gone:
                continue
            rest, own = _without(numbers, place), int(numbers[place])
            below = sum(1 for w, n in lost if w == words and _without(n, place) == rest and int(n[place]) < own)
            if below:
                now = f"{own - below:0{len(numbers[place])}d}" if numbers[place][0] == "0" else f"{own - below}"
                new = (*numbers[:place], now, *numbers[place + 1 :])
                changed[_joined(words, numbers)] = _joined(words, new)
    rename_ends(model, changed)
    if changed:
        known = original_names(model)
        ends = {v.name for v in (*model.graph.inputs, *model.graph.outputs)}
        before_it = {new: known.get(old, old) for old, new in changed.items()}
        kept = {name: old for name, old in known.items() if name in ends and name not in changed.values()}
        model.metadata_props[RENAMED_KEY] = json.dumps({**kept, **before_it})
    return changed


def _renumber_importance(model: ir.Model, left: Sequence[int]) -> None:
    """Say by which outputs the layers that are `left` tell what matters in their caches, as they are numbered now."""
    told = read_importance(model.metadata_props)
    if told is None:
        return
    numbers = {layer: place for place, layer in enumerate(sorted(set(left)))}
    outputs = {numbers[layer]: name for layer, name in told.outputs.items() if layer in numbers}
    if not outputs:
        del model.metadata_props[IMPORTANCE_KEY]
        asked = model.graph.initializers.pop(told.asked, None)
        model.graph.inputs[:] = [value for value in model.graph.inputs if value is not asked]
        return
    named = {name: f"importance.{number}" for number, name in outputs.items() if re.fullmatch(r"importance\.\d+", name)}
    rename_ends(model, named)
    now = {number: named.get(name, name) for number, name in outputs.items()}
    note_importance(model, Importance(told.asked, told.window, now))


def _parts(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The words and the numbers of a name, in turns, words first and last."""
    pieces = re.split(r"(\d+)", name)
    return tuple(pieces[::2]), tuple(pieces[1::2])


def _joined(words: Sequence[str], numbers: Sequence[str]) -> str:
    return "".join(w + n for w, n in zip(words, (*numbers, ""), strict=True))


def _without(numbers: tuple[str, ...], place: int) -> tuple[str, ...]:
    return (*numbers[:place], *numbers[place + 1 :])


def _varying(numbers: Sequence[tuple[str, ...]]) -> int | None:
    """The one place in which numbers of equally many digits groups differ; None where there is none, or more."""
    places = [place for place, column in enumerate(zip(*numbers, strict=True)) if len(set(column)) > 1]
    return places[0] if len(places) == 1 else None


def _answer_by_another(past: ir.Value, others: Iterator[ir.Value]) -> None:
    """Let another cache of the same sizes tell what is asked of the shape of `past`.

    Raises:
        ValueError: Something reads more of it than its shape, or no other cache has its sizes.
    """
    users = [user for user, _ in past.uses()]
    if any(user.op_type != "Shape" for user in users):
        raise ValueError(f"{past.name!r} is still read")
    other = next((value for value in others if value.shape == past.shape), None)
    if other is None:
        raise ValueError(f"the length of {past.name!r} is read, and no other cache has its sizes")
    for user in users:
        user.replace_input_with(0, other)
