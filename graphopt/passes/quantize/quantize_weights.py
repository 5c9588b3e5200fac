"""quantize-weights: constant matrices in a few bits, written as operators that read them so."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.analysis.attention_sites import AttentionSite, attention_sites
from graphopt.analysis.linear_sites import LinearSite, linear_sites
from graphopt.analysis.shapes import infer
from graphopt.calibration.request import Request
from graphopt.calibration.statistics import SecondMoment
from graphopt.errors import ModelError
from graphopt.graph.computed import computed
from graphopt.graph.edits import Editor
from graphopt.graph.scratch import Scratch
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.quantize.activation_level import LEVELS, ActivationLevels
from graphopt.passes.quantize.packing import Operator, Packer, Unpackable, packed_bytes, stacked
from graphopt.passes.quantize.quantized_weight import QuantizedWeight
from graphopt.passes.quantize.setting import Rounded, Setting
from graphopt.passes.quantize.site_weights import as_stored, table_group, weight_rows
from graphopt.passes.quantize.token_weights import TokensOf
from graphopt.runtime_ops.block_products import BlockMatrix
from graphopt.runtime_ops.operator import OLDEST_OPSET

Array = npt.NDArray[Any]
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_OPERATORS = ("contrib", "graphopt", "standard")
_TOKENS = ("all", "linear", "received")
_TOKEN_ROLES = ("k", "v", "kv", "qkv")
TABLES = ("embed", "head")
"""Roles of what is looked up by rows, or may be."""
SMALLEST = 1 << 10
"""Numbers of a matrix that is worth an operator of its own kind."""


@dataclasses.dataclass
class Group:
    """Linear sites that read one value, and are written together where their weights are alike."""

    sites: list[LinearSite]
    setting: Setting


class QuantizeWeights(Pass):
    """Keep the constant matrices of a model in a few bits, and compute with them so.

        w ≈ s · l(c) + m,   0 ≤ c < 2ᵇ

    with a scale s for each group of neighbouring inputs of an output, and levels l of a grid: integers, or the numbers
    of a codebook. What code c a weight gets is a matter of the grid, of how its range is chosen, and of the rounding;
    see docs/quantization.md for what each costs and saves.

    Papers: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (`rounding: gptq`);
    COMQ: A Backpropagation-Free Algorithm for Post-Training Quantization (`comq`); RSQ: Learning from Important Tokens
    Leads to Better Quantized LLMs (`tokens`); EasyQuant: An Efficient Data-free Quantization Algorithm for LLMs
    (`outliers`); EoRA: Training-free Compensation for Compressed LLM with Eigenspace Low-Rank Approximation
    (`compensation`); Pushing the Limits of Large Language Model Quantization via the Linearity Theorem (`grid: higgs`).

    1. MatMul and Gemm with a constant matrix become `MatMulNBits`; with `operator: graphopt` graphopt's
       `QuantizedLinear`, which rounds activations to 16 bits; with `operator: standard` `DequantizeLinear` and MatMul.
       What these don't carry becomes `CodebookMatMul`.
    2. Matrices that read one value (queries, keys and values; gate and up) become one, and a Split.
    3. The embedding and the head get `head_bits`: they cost more than all others at equal bits. Where they are one
       matrix it is stored once, and read by `GatherBlockQuantized` and by the head's operator. In up to 4 bits they
       have zero points, whatever `symmetric` says.
    4. `rounding: gptq` and its kin look at what a matrix multiplies, on the data of `--calibration`, layer by layer:
       with `sequential` each layer sees what the quantized ones before it make.
    5. `tokens` weighs the tokens by the attention that they receive, in the statistics of the `token_roles`: most of
       all is received by the first token, which is one of many in a text, but counts in every sum over values.
    6. `accuracy_level` is chosen for each `MatMulNBits`: 4, unless the data show that rounding what it reads to 8 bits
       loses more than the weight lost, and more than 5 % on a sample of its rows, or 25 % on those with the largest
       outliers (of the first token, in a decoder). Then 0, with weights of 4 bits, or 8 bits twice, the second time of
       what the first left over: what the target profile says is faster (`nbits-inputs`). Without data, 4, or what the
       profile says is faster than that.

    Weights are read, rounded and written one at a time.

    **Options:** `bits` (default 4): 2 to 8; `group_size` (default 32): inputs that share a scale, 0 for all; `grid`
    (default "int"): the numbers of the grid by name; `symmetric` (default true): the middle of the integers is 0; else
    zero points are stored too; `floats` (default false): s · c + m with a float m in place of zero points; `search`
    (default true): ranges of least squared error, else the whole one; `groups` (default "fixed"): of `group_size`;
    "range": FineQuant's choice for each matrix; "axis": AdaDim's, along inputs, or along outputs where an operator has
    them; `rounding` (default "nearest"): "nearest", "gptq", "comq" or "gptq+comq"; `order` (default "groups"): in which
    GPTQ visits the inputs; `damping` (default 0.01): of the Hessian's mean diagonal; `weighed` (default false): errors
    count by the squares of their inputs where ranges are searched; `outliers` (default 0): share of the weights that
    keep their precision; `compensation` (default "none"): a branch of low rank that takes some of the error: "lorc", or
    "eora", which looks at data; `rank` (default 32): its rank; `scale_group` (default 0): inputs that share a searched
    scale with `grid: higgs`, 0: the root of the mean square of those that are rotated together; `tokens` (default
    "all"): "all" alike, "linear" or "received": rule 5; `token_roles` (default k, v, kv, qkv; or all); `sequential`
    (default true): rule 4; `head_bits` (default 8): of the embedding and the head, 0: as they are; `operator` (default
    "contrib"): rule 1; `level` (default "auto"): `accuracy_level` of `MatMulNBits`: 4: activations are rounded to 8
    bits in the weight's blocks, 0: they stay, "auto": rule 6; `exclude` (default none): roles that are left alone, such
    as `down` (see `graphopt inspect`); `roles` (default none): options of the weights of a role, as {v: {bits: 4}};
    `sites` (default none): of single weights, by name.

    **Needs:** float32 or float16; opset 18 for graphopt's operators, 21 for `standard`; canonical operators (the
    recipe's passes before it); data for all roundings but nearest. **Guarantees:** LOSSY.

    **Left alone, with the reason:** matrices of subgraphs and functions; 1 × 1 convolutions; a Gemm that scales or
    transposes what it reads; matrices of fewer than 1,024 numbers; what no operator carries.

    **When not to use it:** where many tokens are computed at once, as in encoders: integers of the activations
    (`int8-dynamic`) save time there, weights alone don't. For sessions with `ORT_DISABLE_ALL`: scales are stored in
    half precision and cast, and ONNX Runtime 1.31 computes such products wrongly where it folds no constants;
    `graphopt.session` sets what prevents that (`session.disable_prepacking`).
    """

    name: ClassVar[str] = "quantize-weights"
    family: ClassVar[str] = "quantize"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    portable: ClassVar[Mapping[str, Any]] = {"operator": "standard"}

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 32,
        grid: str = "int",
        symmetric: bool = True,
        floats: bool = False,
        search: bool = True,
        groups: str = "fixed",
        rounding: str = "nearest",
        order: str = "groups",
        damping: float = 0.01,
        weighed: bool = False,
        outliers: float = 0.0,
        compensation: str = "none",
        rank: int = 32,
        scale_group: int = 0,
        tokens: str = "all",
        token_roles: list[str] | None = None,
        sequential: bool = True,
        head_bits: int = 8,
        operator: str = "contrib",
        level: int | str = "auto",
        exclude: list[str] | None = None,
        sites: dict[str, dict[str, Any]] | None = None,
        roles: dict[str, dict[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if head_bits and not 2 <= head_bits <= 8:
            raise ValueError(f"the head has 2 to 8 bits, or 0 to stay, not {head_bits}")
        if operator not in _OPERATORS:
            raise ValueError(f"operator is one of {', '.join(_OPERATORS)}, not {operator!r}")
        if level not in LEVELS:
            raise ValueError(f"level is auto, 4 or 0, not {level}")
        if tokens not in _TOKENS:
            raise ValueError(f"tokens is one of {', '.join(_TOKENS)}, not {tokens!r}")
        self.setting = Setting().with_options(
            {
                "bits": bits, "group_size": group_size, "grid": grid, "symmetric": symmetric, "floats": floats,
                "search": search, "groups": groups, "rounding": rounding, "order": order, "damping": damping,
                "weighed": weighed, "outliers": outliers, "compensation": compensation, "rank": rank,
                "scale_group": scale_group,
            }
        )  # fmt: skip
        self.tokens, self.sequential, self.head_bits, self.level = tokens, sequential, head_bits, level
        self.token_roles = list(_TOKEN_ROLES if token_roles is None else token_roles)
        self.operator: Operator = operator  # type: ignore[assignment]
        self.exclude = list(exclude or ())
        self.sites_given, self.roles_given = dict(sites or {}), dict(roles or {})
        self._own = {name: self.setting.with_options(options) for name, options in self.sites_given.items()}
        self._of_role = {role: self.setting.with_options(options) for role, options in self.roles_given.items()}
        if any(setting.calibrated for setting in (self.setting, *self._own.values(), *self._of_role.values())):
            self.needs = ("second-moment",)

    def option_values(self) -> dict[str, Any]:
        """See the base."""
        values = {**dataclasses.asdict(self.setting), **super().option_values()}
        values |= {"sites": self.sites_given, "roles": self.roles_given}
        return {name: values[name] for name in self.options() if name in values}

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        edit = Editor(model)
        attention = attention_sites(model, infer(model))
        groups = self.groups(model, attention)
        if not groups:
            return False
        self._packer = Packer(edit, self.operator)
        self._levels = ActivationLevels(self.level if self.operator == "contrib" else 4, self.profile)
        self._scratch = Scratch()
        self._tables: dict[tuple[ir.Value, bool], BlockMatrix] = {}
        self._floats: dict[ir.Value, ir.TensorProtocol | None] = {}
        try:
            rounded = self._calibrated(model, groups, attention) if self.needs else {}
            changed = [self._write(group, [rounded.get(site.node) for site in group.sites], edit) for group in groups]
        finally:
            del self._packer, self._levels, self._scratch, self._tables, self._floats
        if any(changed) and self.operator != "standard":
            model.graph.opset_imports.setdefault("com.microsoft", 1)
        return any(changed)

    # ---- what is quantized

    def _taken(self, model: ir.Model, site: LinearSite, edit: Editor) -> bool:
        reason = self._obstacle(model, site, edit)
        return reason is None or (bool(reason) and self.left(site.node, reason))

    def groups(self, model: ir.Model, attention: list[AttentionSite]) -> list[Group]:
        """What is quantized: sites that read one value together, in the order of the first of each."""
        edit = Editor(model)
        sites = [site for site in linear_sites(model, attention) if self._taken(model, site, edit)]
        found: dict[Any, Group] = {}
        for site in sites:
            setting = self._own.get(site.weight.name or "", self._of_role.get(site.role, self.setting))
            if site.role in TABLES and site.weight.name not in self._own:
                # Zero points take a quarter of the error of SmolLM2's table in 4 bits, and 3 % more bytes.
                setting = Setting(self.head_bits, table_group(setting.group_size, site), symmetric=self.head_bits > 4)
            # What is read elsewhere too is written once, by itself.
            alone = site.role in TABLES or bool(site.shared)
            key = site.node if alone else (site.x, setting)
            found.setdefault(key, Group([], setting)).sites.append(site)
        return list(found.values())

    def _obstacle(self, model: ir.Model, site: LinearSite, edit: Editor) -> str | None:
        """Why a site stays as it is ("": not worth a word); None: it doesn't."""
        if site.weight.const_value is None or site.weight.const_value.dtype not in _TYPES:
            return ""
        if site.node.graph is not model.graph:
            return "it stands in a subgraph or function"
        if site.role in self.exclude or (site.role in TABLES and not self.head_bits):
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

    def _calibrated(
        self, model: ir.Model, groups: list[Group], attention: list[AttentionSite]
    ) -> dict[ir.Node, Rounded]:
        """Round all that looks at data, layer by layer."""
        assert self.calibration is not None
        weights = TokensOf(model, attention, self.tokens, self.token_roles)
        requests: dict[Request, list[tuple[LinearSite, Setting]]] = {}
        for group in groups:
            for site in group.sites:
                if site.x is not None and (group.setting.calibrated or site.role == "head"):
                    requests.update({request: [] for request in self._levels.requests(site)})
                if group.setting.calibrated and site.x is not None:
                    request = Request(site.x, SecondMoment(), weights.of(site))
                    requests.setdefault(request, []).append((site, group.setting))
        found: dict[ir.Node, Rounded] = {}
        for stage in self.calibration.stages(model, list(requests), sequential=self.sequential, grain="site"):
            self._levels.see(stage)
            for request, summary in stage.summaries.items():
                for site, setting in requests[request]:
                    rounded = self._kept(self._round(site, setting, summary.array))
                    self._levels.measure(site, rounded, self._packer.blocks_of(rounded.weight))
                    found[site.node] = rounded
                    if self.sequential:
                        self._floats[site.weight] = site.weight.const_value
                        _give(site, rounded)
            self._levels.forget()
        return found

    @staticmethod
    def _round(site: LinearSite, setting: Setting, hessian: Array | None = None) -> Rounded:
        try:
            return setting.round(weight_rows(site), hessian)
        except ValueError as error:
            raise ModelError(f"The weight {site.weight.name!r} can't be quantized: {error}.") from error

    def _kept(self, rounded: Rounded) -> Rounded:
        """A weight whose large arrays lie in a file until it is packed."""
        changes: dict[str, Any] = {}
        for name in ("codes", "scales", "zero_points", "offsets", "selectors"):
            if (array := getattr(rounded.weight, name)) is not None:
                changes[name] = self._scratch.array(array)
        return dataclasses.replace(rounded, weight=dataclasses.replace(rounded.weight, **changes))

    # ---- writing

    def _write(self, group: Group, given: list[Rounded | None], edit: Editor) -> bool:
        sites = group.sites
        if sites[0].role == "embed" or sites[0].shared:
            return self._write_table(sites[0], given[0], group.setting, edit)
        pairs = zip(sites, given, strict=True)
        rounded = [self._round(site, group.setting) if one is None else one for site, one in pairs]
        joined = stacked([one.weight for one in rounded])
        if joined is not None:
            return self._write_product(sites, joined, rounded, group.setting, edit)
        each = zip(sites, rounded, strict=True)
        return any([self._write_product([site], one.weight, [one], group.setting, edit) for site, one in each])

    def _write_product(
        self, sites: list[LinearSite], weight: QuantizedWeight, rounded: list[Rounded], setting: Setting, edit: Editor
    ) -> bool:
        first = sites[0]
        edit.at(first.node)
        x = first.node.inputs[0]
        assert x is not None
        mark = edit.made()
        block = self._packer.blocks_of(weight)
        for site, one in zip(sites, rounded, strict=True):
            self._levels.measure(site, one, block)
        inputs, why = self._levels.chosen(sites, weight.bits, block)
        try:
            y = self._packer.product(x, weight, first.weight.name or "weight", inputs)
        except Unpackable as error:
            edit.discard(mark)
            if weight.transposed and not setting.calibrated:
                # No operator has these groups along the outputs; along the inputs they lose more, and floats take more.
                again = Group(sites, setting.with_options({"groups": "fixed"}))
                return self._write(again, [None] * len(sites), edit)
            for site in sites:
                site.weight.const_value = self._floats.get(site.weight, site.weight.const_value)
                self.left(site.node, str(error))
            return False
        outputs = [y]
        if len(sites) > 1:
            widths = edit.constant(np.array([site.outputs for site in sites], np.int64), "widths")
            split = edit.op("Split", [y, widths], {"axis": -1}, outputs=len(sites)).producer()
            assert split is not None
            outputs = list(split.outputs)
        for site, output, one in zip(sites, outputs, rounded, strict=True):
            self.applied(site.node, _said(weight, len(sites)) + why)
            edit.at(site.node)
            product = output if one.branch is None else self._packer.with_branch(output, x, one.branch)
            self._take_over(site, product, edit)
        return True

    def _write_table(self, site: LinearSite, given: Rounded | None, setting: Setting, edit: Editor) -> bool:
        """A weight that is read in several places, or by rows: stored once, written at each."""
        edit.at(site.node)
        name = site.weight.name or "weight"
        key = (site.weight, site.role == "embed" or site.orientation == "out,in")
        rounded = given
        if key not in self._tables or self._levels.waiting(site):
            rounded = given or self._round(site, setting)
        if key not in self._tables:
            assert rounded is not None
            try:
                self._tables[key] = self._packer.matrix(rounded.weight, name)
            except Unpackable as error:
                return self.left(site.node, str(error))
        matrix = self._tables[key]
        if rounded is not None:
            self._levels.measure(site, rounded, matrix.block)
        inputs, why = self._levels.chosen([site], matrix.bits, matrix.block)
        self.applied(site.node, f"{matrix.bits} bits in blocks of {matrix.block}, stored once{why}")
        if site.role == "embed":
            indices = site.node.inputs[1]
            assert indices is not None
            edit.replace(site.node.outputs[0], self._packer.products.gather(matrix, indices, like=site.node.outputs[0]))
            return True
        x = site.node.inputs[0]
        assert x is not None
        self._take_over(site, self._packer.multiply(x, matrix, inputs), edit)
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


def _give(site: LinearSite, rounded: Rounded) -> None:
    """Let the float weight of a site be what it was rounded to, so that what follows sees that."""
    old = site.weight.const_value
    assert old is not None
    dtype = old.dtype

    def compute() -> ir.TensorProtocol:
        return ir.tensor(as_stored(site, rounded.dequantized(), dtype.numpy()))

    site.weight.const_value = computed(compute, dtype, old.shape.numpy(), site.weight.name)


def _plain(gemm: ir.Node) -> bool:
    factors = [gemm.attributes.get_float(name, 1.0) for name in ("alpha", "beta")]
    return factors == [1.0, 1.0] and attribute_int(gemm, "transA", 0) == 0


def _said(weight: QuantizedWeight, together: int) -> str:
    numbers = weight.rows * weight.columns
    text = f"{weight.bits} bits, {8 * packed_bytes(weight) / numbers:.2f} with scales"
    return text if together == 1 else f"{text}, {together} matrices as one"
