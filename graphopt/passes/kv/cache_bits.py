"""Bits of the keys and the values of each layer, so that together they lose least under a budget of mean bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts, infer
from graphopt.calibration.calibration import Calibration
from graphopt.graph.computed import LAZY_BYTES
from graphopt.graph.edits import Editor, sort
from graphopt.graph.kv_interface import KVInterface
from graphopt.passes.fold.layers import layer_of
from graphopt.passes.lower.cached_site import CachedSite, NotTaken, Operand, read
from graphopt.search.allocation import Choice, Item, allocate
from graphopt.verification.trials import Trials

Part = Literal["key", "value"]
Bits: TypeAlias = dict[int, dict[Part, int]]
"""Bits of keys and of values by the number of the layer."""

WIDTHS = (2, 3, 4, 8)
PROBE = 3
"""Bits in which each layer's keys, or values, are rounded for their sensitivity: where its squares still tell."""


def bits_given(sites: dict[int, dict[str, int]] | None) -> Bits:
    """Bits by layer, of `sites` as it was given.

    Raises:
        ValueError: It has another form.
    """
    found: Bits = {}
    for layer, given in (sites or {}).items():
        bits = dict(given) if isinstance(given, dict) else {}
        if not bits or bits.keys() - {"key_bits", "value_bits"} or any(n not in WIDTHS for n in bits.values()):
            raise ValueError(f"sites holds key_bits and value_bits, 2, 3, 4 or 8, by layer, not {given} for {layer}")
        parts: dict[Part, int] = {}
        if "key_bits" in bits:
            parts["key"] = bits["key_bits"]
        if "value_bits" in bits:
            parts["value"] = bits["value_bits"]
        found[int(layer)] = parts
    return found


def as_options(bits: Mapping[Part, int]) -> dict[str, int]:
    """Bits of a layer as they are given."""
    return {f"{part}_bits": number for part, number in bits.items()}


def allocated(sensitivity: Mapping[tuple[int, Part], float], budget: float) -> Bits:
    """The bits of least Σ α · e(b) whose mean is at most `budget`, with e(b) = 1 / (2ᵇ − 1)².

    The squared error of rounding falls with the square of the number of steps; α is what an error costs.

    Args:
        sensitivity: α of the keys and of the values of each layer.
        budget: The mean number of bits.

    Raises:
        UsageError: The budget is less than the fewest bits.
    """
    items = [
        Item(f"{layer} {part}", tuple(Choice(str(bits), bits, alpha * _error(bits)) for bits in WIDTHS))
        for (layer, part), alpha in sensitivity.items()
    ]
    found = allocate(items, budget * len(items))
    chosen: Bits = {}
    for (layer, part), choice in zip(sensitivity, found.chosen, strict=True):
        chosen.setdefault(layer, {})[part] = int(choice.name)
    return chosen


def by_norms(sites: Mapping[int, CachedSite]) -> dict[tuple[int, Part], float]:
    """α from the weights alone: the squared Frobenius norm of the projection, ‖W_k‖² or ‖W_v‖².

    Paper: More for Keys, Less for Values: Adaptive KV Cache Quantization (Hariri et al., 2025). A layer whose
    projection can't be found counts as the mean of the others.
    """
    found: dict[tuple[int, Part], float | None] = {}
    for layer, site in sites.items():
        found[layer, "key"], found[layer, "value"] = _norm(site.k), _norm(site.v)
    known = [norm for norm in found.values() if norm is not None]
    mean = float(np.mean(known)) if known else 1.0
    return {key: mean if norm is None else norm for key, norm in found.items()}


def _norm(operand: Operand) -> float | None:
    node = operand.value.producer() if operand.layout == "tokens" else None
    layer = None if node is None else layer_of(node)
    if layer is None or isinstance(layer, str):
        return None
    array = layer.weight.numpy()
    step = max(1, LAZY_BYTES // max(1, array[:1].nbytes))
    pieces = (array[i : i + step].astype(np.float64) for i in range(0, len(array), step))
    return float(sum(np.square(piece).sum() for piece in pieces))


def by_loss(
    model: ir.Model, interface: KVInterface, calibration: Calibration, samples: int
) -> dict[tuple[int, Part], float]:
    """α from trials: the divergence of the model's outputs where the keys, or the values, of one layer alone are
    rounded to 3 bits (keys per channel, values per token), over e(3).

    Each layer's rounding is in the graph behind a gate, an input of one session.
    """
    copy = model.clone()
    edit, facts = Editor(copy), infer(copy, believe_names=True)
    gates: dict[tuple[int, Part], ir.Value] = {}
    for layer, site in cached_sites(copy, interface, facts).items():
        gates[layer, "key"] = _gated(site.k, site, "key", edit, facts)
        gates[layer, "value"] = _gated(site.v, site, "value", edit, facts)
    sort(copy)
    data = calibration.feeds(model, samples)
    trials = Trials(
        copy, list(gates.values()), data, threads=calibration.threads, jobs=calibration.jobs, together=len(gates)
    )  # fmt: skip
    losses = trials.losses({gate.name or "": np.ones(1, np.float32)} for gate in gates.values())
    counted = calibration.counted("sensitivity of the cache", losses, len(gates))
    return {key: loss / _error(PROBE) for key, loss in zip(gates, counted, strict=True)}


def cached_sites(model: ir.Model, interface: KVInterface, facts: ShapeFacts) -> dict[int, CachedSite]:
    """The attentions with a cache of their own that can be read, by the number of the layer."""
    numbers = {pair.past: pair.layer for pair in interface.pairs if pair.part == "key"}
    found: dict[int, CachedSite] = {}
    for node in model.graph:
        if node.op_type != "Attention":
            continue
        try:
            site = read(node, facts)
        except NotTaken:
            continue
        if site is not None and site.shared is None and site.past_key.name in numbers:
            found[numbers[site.past_key.name]] = site
    return dict(sorted(found.items()))


def _gated(operand: Operand, site: CachedSite, part: Part, edit: Editor, facts: ShapeFacts) -> ir.Value:
    """Let whoever reads an operand read x + g (Q(x) − x), and return the gate g, which is 0."""
    value = operand.value
    users: Sequence[tuple[ir.Node, int]] = [(use.node, use.idx) for use in value.uses()]
    edit.at(users[0][0])
    # One gate for each operand, also where two read one value.
    gate = edit.constant(np.zeros(1, np.float32), "gate")
    x = value
    if operand.layout == "tokens":
        x = edit.op("Reshape", [x, edit.constant(np.array([0, 0, operand.heads, site.depth]), "heads")])
    tokens = 2 if operand.layout == "heads" else 1
    axis = edit.constant(np.array([tokens if part == "key" else 3]), "axis")
    low, high = edit.op("ReduceMin", [x, axis]), edit.op("ReduceMax", [x, axis])
    dtype = (facts.dtype(value) or ir.DataType.FLOAT).numpy()
    steps, least = (edit.constant(np.array(n, dtype), "steps") for n in (2**PROBE - 1, 1e-6))
    step = edit.op("Max", [edit.op("Div", [edit.op("Sub", [high, low]), steps]), least])
    codes = edit.op("Round", [edit.op("Div", [edit.op("Sub", [x, low]), step])])
    rounded = edit.op("Add", [edit.op("Mul", [codes, step]), low])
    opened = gate if dtype == np.float32 else edit.op("Cast", [gate], {"to": ir.DataType(value.dtype or 1).value})
    mixed = edit.op("Add", [x, edit.op("Mul", [opened, edit.op("Sub", [rounded, x])])])
    if operand.layout == "tokens":
        mixed = edit.op("Reshape", [mixed, edit.constant(np.array([0, 0, -1]), "joined")], like=value)
    for user, slot in users:
        user.replace_input_with(slot, mixed)
    return gate


def _error(bits: int) -> float:
    return 1 / (2.0**bits - 1) ** 2
