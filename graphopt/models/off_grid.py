"""Off-grid decoders: the same function with weights that no longer lie on the grid of an earlier quantization.

    python -m graphopt.models.off_grid model.onnx off-grid/model.onnx

The trained weights of SmolLM2-135M that can be had come from a file of 4 bits (Q4_1): 16 values in each block of 32.
A 4-bit grid that meets these values loses nothing, and a search for grids finds them by luck, so what a method costs
can't be told from that model. An exactly equivalent one is made of it by two rewrites that move the weights off it:

    W (γ ⊙ n(x)) = (W·diag(γ)) n(x)                                 gains of the norms go into the layers behind them
    W₂ (f(x) ⊙ (W₁ y)) = (W₂·diag(1/s)) (f(x) ⊙ (diag(s)·W₁ y))     s drawn from [0.8, 1.25]: up → down
    W₂ softmax(..)(W₁ y) = (W₂·diag(1/s)) softmax(..)(diag(s)·W₁ y) the same for V → O, head by head

Where query heads share a head of values, its factors are repeated for each of them. The values that such a decoder
keeps in its cache are scaled by s too: caches of the original and of this model can't be mixed.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import is_op, users
from graphopt.analysis.attention_sites import AttentionSite, attention_sites
from graphopt.analysis.linear_sites import LinearSite, linear_sites
from graphopt.analysis.shapes import infer
from graphopt.analysis.views import VIEWS
from graphopt.errors import GraphoptError, ModelError
from graphopt.graph import computed
from graphopt.graph.constants import constant_tensor, is_constant
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.pass_manager import PassManager
from graphopt.passes.fold.norm_affine import FoldNormAffine
from graphopt.recipe import load as load_recipe

LOW, HIGH = 0.8, 1.25
"""Bounds of the factors; their logarithms are uniform."""
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two linear sites between which each channel may be scaled.

    Attributes:
        writer: Makes the channels: v or up.
        reader: Reads them: o or down.
        channels: For each input of the reader the output of the writer that it comes from [reader's inputs].
    """

    writer: LinearSite
    reader: LinearSite
    channels: npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class OffGrid:
    """What was done to a model.

    Attributes:
        norms: Norms whose gain went into the layers behind them.
        pairs: Names of the nodes between which channels were scaled.
        left: What was left as it is: a node's name and the reason.
    """

    norms: int
    pairs: tuple[tuple[str, str], ...]
    left: tuple[tuple[str, str], ...]


def off_grid(model: ir.Model, seed: int = 0) -> OffGrid:
    """Bring a decoder to standard operators and move its weights off their grid, in place and exactly.

    The gain of a norm in front of a head that shares its table with the embedding stays where it is. Large weights are
    computed when they are saved, one at a time.

    Args:
        model: A decoder with gated MLPs; any export of one.
        seed: Of the factors: the same seed gives the same weights.

    Raises:
        ModelError: The model has no V → O and no up → down whose channels can be scaled.
    """
    folding = FoldNormAffine()
    raising = [p for p in load_recipe().passes() if getattr(p, "family", "") in ("clean", "raise")]
    PassManager(raising, verify="none")(model)
    folding(model)
    attention = attention_sites(model, infer(model, believe_names=True))
    sites = linear_sites(model, attention)
    folded = [site for site in folding.sites if site.outcome == "applied"]
    left = [(site.node, site.detail) for site in folding.sites if site.outcome == "left"]
    scaled: list[tuple[str, str]] = []
    for found in pairs(sites, attention):
        if isinstance(found, Pair):
            rng = np.random.default_rng((seed, len(scaled)))
            factors = np.exp(rng.uniform(np.log(LOW), np.log(HIGH), size=found.writer.outputs))
            _scale(found, factors, (seed, len(scaled)))
            scaled.append((found.writer.node.name or "", found.reader.node.name or ""))
        else:
            left.append(found)
    if not scaled:
        raise ModelError(
            "There is nothing to scale: no V → O of an attention and no up → down of a gated MLP is known."
        )
    return OffGrid(len(folded), tuple(scaled), tuple(left))


def pairs(sites: list[LinearSite], attention: list[AttentionSite]) -> Iterator[Pair | tuple[str, str]]:
    """V → O of each attention, then up → down of each gated MLP; or the name of the reader and why there is no pair.

    Args:
        sites: The linear sites of the model.
        attention: Its attention sites.
    """
    by_node = {site.node: site for site in sites}
    for one in attention:
        name = one.node.name or ""
        if one.output is not one.node.outputs[0] or one.kv_heads is None:
            yield name, "the attention isn't one operator, or its number of heads isn't known"
            continue
        writer, reader = _maker(one.v, by_node, "v"), _taker(one.output, by_node, "o")
        if writer is None or reader is None:
            yield name, "something besides views lies between the attention and its linear layers, or reads them too"
        elif writer.outputs % one.kv_heads or reader.inputs % writer.outputs or _fixed(writer) or _fixed(reader):
            yield name, "a weight is shared or quantized, or the heads don't fit it"
        else:
            by_head = np.arange(writer.outputs).reshape(one.kv_heads, -1)
            yield Pair(writer, reader, by_head.repeat(reader.inputs // writer.outputs, axis=0).reshape(-1))
    for reader in sites:
        if reader.role != "down":
            continue
        name = reader.node.name or ""
        product = None if reader.x is None or not _read_once(reader.x) else reader.x.producer()
        if product is None or not is_op(product, "Mul"):
            yield name, "its input isn't a product that nothing else reads"
            continue
        makers = [made for value in product.inputs if value is not None and (made := _maker(value, by_node, "up"))]
        if len(makers) != 1 or makers[0].outputs != reader.inputs or _fixed(makers[0]) or _fixed(reader):
            yield name, "its up projection isn't known, or a weight is shared or quantized"
        else:
            yield Pair(makers[0], reader, np.arange(reader.inputs))


def _maker(value: ir.Value, by_node: dict[ir.Node, LinearSite], role: str) -> LinearSite | None:
    """The linear site that `value` is a view of, where nothing else reads it on the way."""
    while (node := value.producer()) is not None and _read_once(value):
        site = by_node.get(node)
        if site is not None:
            return site if site.role == role else None
        inner = _seen_through(node)
        if inner is None:
            return None
        value = inner
    return None


def _taker(value: ir.Value, by_node: dict[ir.Node, LinearSite], role: str) -> LinearSite | None:
    """The linear site that reads a view of `value`, where nothing else does."""
    while _read_once(value):
        node = _readers(value)[0]
        site = by_node.get(node)
        if site is not None:
            return site if site.role == role and site.x is value else None
        if not is_op(node, *VIEWS) or node.inputs[0] is not value:
            return None
        value = node.outputs[0]
    return None


def _seen_through(node: ir.Node) -> ir.Value | None:
    """What a view, or the addition of a bias, is made of."""
    if is_op(node, *VIEWS):
        return node.inputs[0]
    if is_op(node, "Add"):
        varying = [value for value in node.inputs if not is_constant(value)]
        return varying[0] if len(varying) == 1 else None
    return None


def _readers(value: ir.Value) -> list[ir.Node]:
    return [user for user in users(value) if not is_op(user, "Shape")]


def _read_once(value: ir.Value) -> bool:
    return len(_readers(value)) == 1 and not value.is_graph_output()


def _fixed(site: LinearSite) -> bool:
    """Whether the weight or bias can't be exchanged: another node reads it, or it isn't stored as floats."""
    kept = (site.weight, *_biases(site))
    return bool(site.shared) or any(
        not value.is_initializer() or len(value.uses()) != 1 or not tensor.dtype.is_floating_point()
        for value in kept
        if (tensor := constant_tensor(value)) is not None
    )


def _biases(site: LinearSite) -> Iterable[ir.Value]:
    """The constants that are added to the outputs of a site: in the node, and in an addition behind it."""
    if is_op(site.node, "Gemm") and len(site.node.inputs) > 2 and site.node.inputs[2] is not None:
        yield site.node.inputs[2]
    for user in _readers(site.node.outputs[0]):
        if is_op(user, "Add"):
            yield from (value for value in user.inputs if value is not None and is_constant(value))


def _scale(pair: Pair, factors: npt.NDArray[np.float64], origin: tuple[int, ...]) -> None:
    """Multiply the writer's outputs by `factors` [outputs], and what reads them by 1 over these."""
    writer, reader = pair.writer, pair.reader
    axis = -1 if writer.orientation == "in,out" else 0
    _multiply(writer.weight, factors, axis, ("off-grid writer", *origin))
    for bias in _biases(writer):
        _multiply(bias, factors, -1, ("off-grid bias", *origin))
    axis = 0 if reader.orientation == "in,out" else -1
    _multiply(reader.weight, 1 / factors[pair.channels], axis, ("off-grid reader", *origin))


def _multiply(value: ir.Value, factors: npt.NDArray[np.float64], axis: int, origin: tuple[str | int, ...]) -> None:
    """Make an initializer what it is times `factors` along `axis`, rounded once."""
    tensor = value.const_value
    assert tensor is not None
    shape = tensor.shape.numpy()
    full = (-1, *[1] * (len(shape) - 1)) if axis == 0 else (-1,)
    if len(shape) and shape[axis] == 1:
        raise ModelError(f"{value.name!r} holds one number for all channels, which can't be scaled one by one.")

    def compute() -> ir.TensorProtocol:
        numbers = tensor.numpy()
        return ir.tensor((numbers.astype(np.float64) * factors.reshape(full)).astype(numbers.dtype), name=value.name)

    value.const_value = computed.weight(
        compute, tensor.dtype, shape, name=value.name, origin=(*origin, computed.identity(tensor))
    )


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m graphopt.models.off_grid", description=(__doc__ or "")[:114])
    parser.add_argument("source", type=Path, help="the .onnx file of a decoder")
    parser.add_argument("output", type=Path, help="the .onnx file to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--companions", type=Path, help="the folder of tokenizer.json and config.json; default: source's"
    )
    options = parser.parse_args(arguments)
    try:
        model = load(options.source)
        done = off_grid(model, options.seed)
        save(model, options.output, external_data=True)
    except GraphoptError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for name in COMPANIONS:
        file = (options.companions or options.source.parent) / name
        if file.exists() and file.resolve() != (options.output.parent / name).resolve():
            shutil.copy2(file, options.output.parent / name)
    for name, reason in done.left:
        print(f"left alone: {name}: {reason}")
    print(
        f"{options.output}: {done.norms} norms folded, {len(done.pairs)} pairs of layers scaled (seed {options.seed})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
