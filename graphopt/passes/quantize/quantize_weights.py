"""quantize-weights: constant matrices in a few bits, written as operators that read them so."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.linear_sites import LinearSite, linear_sites
from graphopt.analysis.shapes import infer
from graphopt.graph.edits import Editor
from graphopt.graph.scratch import Scratch
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.quantize.grids import Grid, UniformGrid
from graphopt.passes.quantize.packing import Operator, Packer, Unpackable, packed_bytes, stacked
from graphopt.passes.quantize.quantized_weight import QuantizedWeight
from graphopt.passes.quantize.roundings import round_to_nearest
from graphopt.runtime_ops.block_products import BlockMatrix
from graphopt.runtime_ops.operator import OLDEST_OPSET

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_OPERATORS = ("contrib", "graphopt", "standard")
_TABLES = ("embed", "head")
SMALLEST = 1 << 10
"""Numbers of a matrix that is worth an operator of its own kind."""


@dataclasses.dataclass
class _Group:
    """Linear sites that read one value, and are written together where their weights are alike."""

    sites: list[LinearSite]
    bits: int


class QuantizeWeights(Pass):
    """Keep the constant matrices of a model in a few bits, and compute with them so.

        w ≈ s · (c − z),   0 ≤ c < 2ᵇ

    with a scale s for each group of neighbouring inputs of an output. What c a weight gets is a matter of the grid, of
    how its range is chosen, and of the rounding; see docs/quantization.md for what each costs and saves.

    1. MatMul and Gemm with a constant matrix become `MatMulNBits`; with `operator: graphopt` graphopt's
       `QuantizedLinear`, which rounds activations to 16 bits; with `operator: standard` `DequantizeLinear` and MatMul.
       What these don't carry becomes `CodebookMatMul`.
    2. Matrices that read one value (queries, keys and values; gate and up) become one, and a Split.
    3. The embedding and the head get `head_bits`: they cost more than all others at equal bits. Where they are one
       matrix it is stored once, and read by `GatherBlockQuantized` and by the head's operator.

    Weights are read, rounded and written one at a time.

    **Options:** `bits` (default 4): 2 to 8; `group_size` (default 32): inputs that share a scale, 0 for all;
    `symmetric` (default true): z is the middle; else it is stored too; `floats` (default false): s · c + m with a float
    m in place of zero points; `search` (default true): ranges of least squared error, else the whole one; `head_bits`
    (default 8): of the embedding and the head, 0: as they are; `operator` (default "contrib"): rule 1; `level` (default
    4): `accuracy_level` of `MatMulNBits`: 4: activations are rounded to 8 bits in the weight's blocks, 0: they stay;
    `exclude` (default none): roles that are left alone, such as `down` (see `graphopt inspect`).

    **Needs:** float32 or float16; opset 18 for graphopt's operators, 21 for `standard`; canonical operators (the
    recipe's passes before it). **Guarantees:** LOSSY.

    **Left alone, with the reason:** matrices of subgraphs and functions; 1 × 1 convolutions; a Gemm that scales or
    transposes what it reads; matrices of fewer than 1,024 numbers; what no operator carries.

    **When not to use it:** where many tokens are computed at once, as in encoders: integers of the activations
    (`int8-dynamic`) save time there, weights alone don't.
    """

    name: ClassVar[str] = "quantize-weights"
    family: ClassVar[str] = "quantize"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 32,
        symmetric: bool = True,
        floats: bool = False,
        search: bool = True,
        head_bits: int = 8,
        operator: str = "contrib",
        level: int = 4,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__()
        if not 2 <= bits <= 8 or (head_bits and not 2 <= head_bits <= 8):
            raise ValueError(f"weights have 2 to 8 bits, not {bits} and {head_bits}")
        if group_size < 0 or group_size % 8:
            raise ValueError(f"group_size must be a multiple of 8, or 0 for whole rows, not {group_size}")
        if operator not in _OPERATORS:
            raise ValueError(f"operator is one of {', '.join(_OPERATORS)}, not {operator!r}")
        if level not in (0, 4):
            raise ValueError(f"level is 0 or 4, not {level}")
        self.bits, self.group_size, self.symmetric, self.floats = bits, group_size, symmetric, floats
        self.search, self.head_bits, self.level = search, head_bits, level
        self.operator: Operator = operator  # type: ignore[assignment]
        self.exclude = list(exclude or ())
        self._grid(bits)

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        edit = Editor(model)
        sites = linear_sites(model, attention_sites(model, infer(model)))
        groups = list(self._groups(model, sites, edit))
        if not groups:
            return False
        self._packer = Packer(edit, self.operator, self.level)
        self._scratch = Scratch()
        self._written: dict[tuple[ir.Value, bool], BlockMatrix | QuantizedWeight] = {}
        changed = False
        for group in groups:
            changed |= self._write(group, edit)
        if changed and self.operator != "standard":
            model.graph.opset_imports.setdefault("com.microsoft", 1)
        return changed

    # ---- what is quantized

    def _groups(self, model: ir.Model, sites: list[LinearSite], edit: Editor) -> Iterator[_Group]:
        """The sites to quantize: those that read one value together, in the order of the first of each."""
        found: dict[Any, _Group] = {}
        for site in sites:
            reason = self._obstacle(model, site, edit)
            if reason is not None:
                if reason:
                    self.left(site.node, reason)
                continue
            bits = self.head_bits if site.role in _TABLES else self.bits
            # What is read elsewhere too is written once, by itself.
            alone = site.role in _TABLES or bool(site.shared)
            key = site.node if alone else (site.x, bits)
            found.setdefault(key, _Group([], bits)).sites.append(site)
        yield from found.values()

    def _obstacle(self, model: ir.Model, site: LinearSite, edit: Editor) -> str | None:
        """Why a site stays as it is ("": not worth a word); None: it doesn't."""
        if site.weight.const_value is None or site.weight.const_value.dtype not in _TYPES:
            return ""
        if site.node.graph is not model.graph:
            return "it stands in a subgraph or function"
        if site.role in self.exclude or (site.role in _TABLES and not self.head_bits):
            return f"weights with the role {site.role} are excluded"
        if site.inputs * site.outputs < SMALLEST:
            return f"its weight has only {site.inputs * site.outputs} numbers"
        if site.node.op_type == "Conv":
            return "no operator takes a convolution's weight in blocks"
        if site.node.op_type == "Gemm" and not _plain(site.node):
            return "it scales or transposes what it reads"
        if site.node.op_type == "Gather" and self.operator == "standard":
            return "GatherBlockQuantized isn't standard ONNX"
        if self.operator == "standard" and site.shared:
            return "its weight is read elsewhere too, and would be stored twice"
        if edit.opset < (21 if self.operator == "standard" else OLDEST_OPSET):
            return f"its operators need opset {21 if self.operator == 'standard' else OLDEST_OPSET}"
        return None

    # ---- rounding

    def _grid(self, bits: int) -> Grid:
        return UniformGrid(bits, self.symmetric, self.floats, self.search)

    def _quantize(self, site: LinearSite, bits: int) -> QuantizedWeight:
        weight = _rows(site)
        return round_to_nearest(weight, self._grid(bits), self.group_size or weight.shape[1])

    # ---- writing

    def _write(self, group: _Group, edit: Editor) -> bool:
        sites = group.sites
        first = sites[0]
        edit.at(first.node)
        if first.role == "embed" or first.shared:
            return self._write_table(first, group.bits, edit)
        weights = [self._quantize(site, group.bits) for site in sites]
        joined = stacked(weights)
        if joined is None:
            done = [self._write_product([site], weight, edit) for site, weight in zip(sites, weights, strict=True)]
            return any(done)
        return self._write_product(sites, joined, edit)

    def _write_product(self, sites: list[LinearSite], weight: QuantizedWeight, edit: Editor) -> bool:
        first = sites[0]
        edit.at(first.node)
        x = first.node.inputs[0]
        assert x is not None
        mark = edit.made()
        try:
            y = self._product(x, weight, first.weight.name or "weight", edit)
        except Unpackable as error:
            edit.discard(mark)
            return any([self.left(site.node, str(error)) for site in sites])
        outputs = [y]
        if len(sites) > 1:
            widths = edit.constant(np.array([site.outputs for site in sites], np.int64), "widths")
            split = edit.op("Split", [y, widths], {"axis": -1}, outputs=len(sites)).producer()
            assert split is not None
            outputs = list(split.outputs)
        for site, output in zip(sites, outputs, strict=True):
            self.applied(site.node, _said(weight, len(sites)))
            self._take_over(site, output, edit)
        return True

    def _product(self, x: ir.Value, weight: QuantizedWeight, name: str, edit: Editor) -> ir.Value:
        if self.operator == "standard":
            return edit.op("MatMul", [x, self._packer.dequantized(weight, name)])
        return self._packer.multiply(x, self._packer.matrix(weight, name))

    def _write_table(self, site: LinearSite, bits: int, edit: Editor) -> bool:
        """A weight that is read in several places, or by rows: stored once, written at each."""
        name = site.weight.name or "weight"
        key = (site.weight, site.role == "embed" or site.orientation == "out,in")
        if key not in self._written:
            weight = self._quantize(site, bits)
            try:
                self._written[key] = self._packer.matrix(weight, name)
            except Unpackable as error:
                return self.left(site.node, str(error))
            self._said_of = _said(weight, 1)
        matrix = self._written[key]
        assert isinstance(matrix, BlockMatrix)
        self.applied(site.node, f"{matrix.bits} bits in blocks of {matrix.block}, stored once")
        if site.role == "embed":
            indices = site.node.inputs[1]
            assert indices is not None
            edit.replace(site.node.outputs[0], self._packer.products.gather(matrix, indices, like=site.node.outputs[0]))
            return True
        x = site.node.inputs[0]
        assert x is not None
        self._take_over(site, self._packer.multiply(x, matrix), edit)
        return True

    @staticmethod
    def _take_over(site: LinearSite, product: ir.Value, edit: Editor) -> None:
        """Put a product in the place of a node, with the bias of a Gemm."""
        old = site.node.outputs[0]
        product.type, product.shape = old.type, None if old.shape is None else ir.Shape(old.shape)
        if site.node.op_type == "Gemm" and len(site.node.inputs) > 2 and site.node.inputs[2] is not None:
            edit.at(site.node)
            product = edit.op("Add", [product, site.node.inputs[2]], like=old)
        edit.replace(old, product)


def _rows(site: LinearSite) -> npt.NDArray[np.float32]:
    """The weight of a site [outputs, inputs]; of an embedding as it is."""
    assert site.weight.const_value is not None
    array = site.weight.const_value.numpy()
    if site.role != "embed" and site.orientation == "in,out":
        array = array.T
    return np.ascontiguousarray(array, dtype=np.float32)


def _plain(gemm: ir.Node) -> bool:
    factors = [gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return factors == [1.0, 1.0] and attribute_int(gemm, "transA", 0) == 0


def _said(weight: QuantizedWeight, together: int) -> str:
    numbers = weight.rows * weight.columns
    text = f"{weight.bits} bits, {8 * packed_bytes(weight) / numbers:.2f} with scales"
    return text if together == 1 else f"{text}, {together} matrices as one"
