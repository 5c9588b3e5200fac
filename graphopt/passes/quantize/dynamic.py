"""quantize-dynamic: products with int8 weights, and activations that are rounded to 8 bits as they come."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, is_op
from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.linear_sites import LinearSite, linear_sites
from graphopt.analysis.shapes import lazily
from graphopt.graph.constants import constant_tensor
from graphopt.graph.edits import Editor
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.fold.layers import Layer, bias_behind, layer_of, sole_reader
from graphopt.passes.quantize.integer_weights import SignedGrid, finite, quantized_matrix, quantized_rows
from graphopt.passes.quantize.outlier_features import Features, outlier_features
from graphopt.passes.quantize.selection import Selection
from graphopt.passes.quantize.token_scales import CONTRIB, Quantizer

OPSET = 11
_HIDDEN = ("fc2", "down")
_TOKENS = ("all", "hidden", "none")
_ROW_BLOCK = 16


@dataclasses.dataclass
class _Plan:
    """A product that is taken.

    Attributes:
        site: What `linear_sites` tells of it.
        layer: Its weight; its Add too, where that holds the bias.
        bias: float32 [N], or None.
        by_token: Whether each token gets a scale of its own.
    """

    site: LinearSite
    layer: Layer
    bias: npt.NDArray[np.float32] | None
    by_token: bool

    @property
    def x(self) -> ir.Value:
        x = self.site.x
        assert x is not None
        return x


class QuantizeDynamic(Pass):
    """Multiply by int8 weights, and round activations to 8 bits with ranges that are found as the model runs.

        x · W + b ≈ s_x · s_W ⊙ ((x̂ − z) · Ŵ) + b,   Ŵ = round(W / s_W),  s_W[n] = max |W[:, n]| / 127
        x̂ = round(x / s_x) + z in 0 … 255

    Papers: Integer Quantization for Deep Learning Inference (Wu et al., 2020); scales of tokens: ZeroQuant: Efficient
    and Affordable Post-Training Quantization for Large-Scale Transformers (Yao et al., 2022).

    1. A `MatMul` or `Gemm` with a constant matrix becomes `DynamicQuantizeMatMul`, with the bias behind it. Weights are
       int8 and activations uint8, the one pair that ONNX Runtime has its fastest kernels for.
    2. Products that read one value share one `DynamicQuantizeLinear` and become `MatMulIntegerToFloat` (queries, keys
       and values; gate and up).
    3. Where tokens differ much, which they do behind an activation, one scale for all of them wastes bits: each token
       is divided by its largest number first, and the product with the scale of its token is taken back by
       `MatMulIntegerToFloat`, which takes one scale for each row. `token_scales` says where.
    4. Features that are far larger than the others are multiplied in float32 beside the rest (`outliers`), with data to
       tell which they are: x · W = x_O · W_O + x_R · W_R, of which the second product alone is rounded, and scales of
       tokens are those of x_R (LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale, Dettmers et al.,
       2022, which finds O anew for each input; here it is fixed).
    5. Embeddings, a `Gather` of rows of a constant table, become `GatherBlockQuantized` with 8 bits and one scale for
       each row.

    Measured on ONNX Runtime 1.31 (one thread, AMX and VNNI, 128 tokens, 384 × 1536): 807 µs in float32, 170 as int8
    weights with one scale, 204 with a scale for each token, 840 as uint8 weights (whatever their zero points).

    **Options:** `token_scales` (default "all"): where each token has a scale: everywhere, "hidden" (rule 3: the second
    layer of feed-forward blocks), or "none"; `outliers` (default 0: none): rule 4, a feature is one where its largest
    magnitude is so many times the median of all features'; `outlier_share` (default 0.06): the most that may be taken,
    as a share of all features; `samples` (default 8): samples that tell; `embeddings` (default true): rule 5;
    `min_weights` (default 4096): numbers of the smallest matrix that is quantized; `min_embedding` (default 65536): of
    the smallest table; `search` (default false): shrink each scale of a weight to where its squared error is least;
    `reduce_range` (default false): weights of 7 bits, which can't saturate on processors of AVX2 or AVX-512 without
    VNNI, whose kernels add two products in 16 bits; `exclude` (default none): sites that are left alone, by role
    ("fc2", "head") or pattern of the node's name.

    **Needs:** opset 11; float32; for rule 4 calibration data. **Guarantees:** LOSSY.

    **Targets:** cpu.

    **Left alone, with the reason:** weights that are shared with a reader that can't be quantized, hold NaN or
    infinity, are quantized already or small; a Gemm that transposes what it multiplies, or whose bias isn't constant.

    **When not to use it:** for convolutions (`quantize-static`), and where one token at a time is generated, which
    weights alone decide (`quantize-weights`).
    """

    name: ClassVar[str] = "quantize-dynamic"
    family: ClassVar[str] = "quantize"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)

    def __init__(
        self,
        token_scales: str = "all",
        outliers: float = 0.0,
        outlier_share: float = 0.06,
        samples: int = 8,
        embeddings: bool = True,
        min_weights: int = 4096,
        min_embedding: int = 65536,
        search: bool = False,
        reduce_range: bool = False,
        exclude: list[str] | None = None,
    ) -> None:
        super().__init__()
        if token_scales not in _TOKENS:
            raise ValueError(f"token_scales is one of {', '.join(_TOKENS)}, not {token_scales!r}")
        if outliers < 0 or not 0 < outlier_share < 1 or samples < 1:
            raise ValueError("outliers can't be negative, outlier_share lies between 0 and 1, samples are positive")
        if outliers and token_scales == "none":
            raise ValueError("outliers are left out of the scales of tokens: token_scales can't be none")
        self.outliers, self.outlier_share, self.samples = outliers, outlier_share, samples
        if outliers:
            self.needs = ("samples",)
        self.token_scales, self.embeddings, self.search = token_scales, embeddings, search
        self.min_weights, self.min_embedding = min_weights, min_embedding
        self.reduce_range, self.exclude = reduce_range, exclude
        self._selection = Selection(exclude)

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        edit = Editor(model)
        facts = lazily(model)
        sites = [s for s in linear_sites(model, attention_sites(model, facts)) if not is_op(s.node, "Conv")]
        taken: dict[ir.Node, _Plan | LinearSite] = {}
        for site in sites:
            found = self._table(site) if site.role == "embed" else self._plan(site, edit)
            if isinstance(found, str):
                if found:
                    self.left(site.node, found)
            else:
                taken[site.node] = found
        for site in sites:
            if site.node in taken and (other := _other_reader(site.weight, taken)) is not None:
                del taken[site.node]
                self.left(
                    site.node, f"its weight is read by {other.op_type} {other.name!r} too, which keeps the floats"
                )
        groups: dict[tuple[ir.Value, bool], list[_Plan]] = defaultdict(list)
        for one in taken.values():
            if isinstance(one, _Plan):
                groups[one.x, one.by_token].append(one)
            else:
                self._write_table(one, edit)
        apart: Features = {}
        if self.outliers:
            inner = [x for x, by_token in groups if by_token and x.producer() in set(model.graph)]
            apart = outlier_features(model, inner, self.calibration, self.outliers, self.outlier_share, self.samples)
        for (x, by_token), plans in groups.items():
            self._write(x, by_token, plans, apart.get(x, np.zeros(0, np.int64)), edit)
        if taken:
            model.graph.opset_imports.setdefault(CONTRIB, 1)
        return bool(taken)

    # ---- deciding

    def _plan(self, site: LinearSite, edit: Editor) -> _Plan | str:
        """How a product is written, or why it isn't; "": not worth a word."""
        node = site.node
        edit.at(node)
        layer = layer_of(node)
        if isinstance(layer, str):
            return f"its weight isn't one of floats: {layer}" if site.weight is not node.inputs[1] else layer
        if layer.weight.dtype != ir.DataType.FLOAT:
            return f"it computes in {layer.weight.dtype.name.lower()}, and the kernels in float32"
        if (why := self._selection.excluded(node, site.role)) is not None:
            return why
        if edit.opset < OPSET:
            return f"needs opset {OPSET}, the model has {edit.opset}: run convert-opset first"
        if (count := site.inputs * site.outputs) < self.min_weights:
            return f"its weight has {count} numbers, and min_weights is {self.min_weights}"
        if is_op(node, "Gemm") and attribute_int(node, "transA", 0) != 0:
            return "it transposes what it multiplies"
        add = bias_behind(layer, sole_reader)
        if add is not None:
            layer = dataclasses.replace(layer, add=add)
        bias = layer.bias()
        if isinstance(bias, str):
            return bias
        if bias.ndim > 1:
            return f"the bias of {layer.name} has one number a row"
        if not finite(layer.weight):
            return "its weight holds NaN or infinity"
        hidden = site.role in _HIDDEN
        by_token = self.token_scales == "all" or (self.token_scales == "hidden" and hidden)
        numbers = np.broadcast_to(bias, (site.outputs,)).astype(np.float32) if bias.any() else None
        return _Plan(site, layer, numbers, by_token)

    def _table(self, site: LinearSite) -> LinearSite | str:
        tensor = constant_tensor(site.weight)
        if not self.embeddings or tensor is None or site.node.inputs[0] is not site.weight:
            return ""
        if tensor.dtype != ir.DataType.FLOAT:
            return f"its table is {tensor.dtype.name.lower()}"
        if (why := self._selection.excluded(site.node, site.role)) is not None:
            return why
        if (count := site.inputs * site.outputs) < self.min_embedding:
            return f"its table has {count} numbers, and min_embedding is {self.min_embedding}"
        return site if finite(tensor) else "its table holds NaN or infinity"

    # ---- writing

    def _write(
        self, x: ir.Value, by_token: bool, plans: list[_Plan], apart: npt.NDArray[np.int64], edit: Editor
    ) -> None:
        first = plans[0]
        edit.at(first.site.node)
        alone = len(plans) == 1 and not by_token
        kept = None
        if apart.size:
            kept = np.ones(first.site.inputs, np.float32)
            kept[apart] = 0
        quantizer = Quantizer(x, edit, by_token=by_token, shifted=first.site.role in _HIDDEN, kept=kept)
        quantized = None if alone else quantizer.write()
        picked = edit.op("Gather", [x, edit.constant(apart, "outliers")], {"axis": -1}) if apart.size else None
        for plan in plans:
            edit.at(plan.layer.add or plan.site.node)
            turned = is_op(plan.site.node, "Gemm") and attribute_int(plan.site.node, "transB", 0) == 1
            grid = SignedGrid(7 if self.reduce_range else 8, search=self.search)
            weight = quantized_matrix(plan.layer.weight, turned, grid, kept)
            alpha = plan.site.node.attributes.get("alpha")
            scales = weight.scales if alpha is None else weight.scales * np.float32(alpha.as_float())
            codes = edit.constant(weight.codes, "int8")
            old = plan.layer.output
            bias = None if plan.bias is None else edit.constant(plan.bias, "bias")
            if quantized is None:
                inputs = [x, codes, edit.constant(scales, "scales"), None, bias]
                y = edit.op("DynamicQuantizeMatMul", inputs, domain=CONTRIB, like=old)
            else:
                y = quantized.product(codes, edit.constant(scales, "scales"), bias, edit, like=old)
            if picked is not None:
                array = plan.layer.weight.numpy()
                rows = np.ascontiguousarray(array[:, apart].T if turned else array[apart])
                if alpha is not None:
                    rows = rows * np.float32(alpha.as_float())
                y = edit.op("Add", [y, edit.op("MatMul", [picked, edit.constant(rows, "outlier_rows")])], like=old)
            shared = f", with {len(plans) - 1} others that read the same" if len(plans) > 1 else ""
            beside = f", {apart.size} features in floats" if apart.size else ""
            self.applied(plan.site.node, f"int8 with a scale for each {'token' if by_token else 'run'}{beside}{shared}")
            edit.replace(old, y)

    def _write_table(self, site: LinearSite, edit: Editor) -> None:
        edit.at(site.node)
        tensor = constant_tensor(site.weight)
        assert tensor is not None
        codes, scales = quantized_rows(tensor)
        block = _ROW_BLOCK
        while block < site.outputs:
            block *= 2
        inputs = [edit.constant(codes, "uint8"), site.node.inputs[1], edit.constant(scales, "scales")]
        attributes = {"bits": 8, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
        y = edit.op("GatherBlockQuantized", inputs, attributes, domain=CONTRIB, like=site.node.outputs[0])
        self.applied(site.node, "8 bits with a scale for each row")
        edit.replace(site.node.outputs[0], y)


def _other_reader(weight: ir.Value, taken: dict[ir.Node, _Plan | LinearSite]) -> ir.Node | None:
    """A node that goes on reading a weight as floats, where one does."""
    for user, _ in weight.uses():
        if user in taken:
            continue
        readers = [use.node for use in user.outputs[0].uses()] if is_op(user, "Transpose") else []
        if not readers or any(reader not in taken for reader in readers):
            return user
    return None
