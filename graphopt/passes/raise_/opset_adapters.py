"""How a node of the default domain is rewritten where an opset redefined its operator.

One function a change, in the words of the operator changelog of the ONNX standard; `opset_steps` says which
changes need none.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import constant_array
from graphopt.passes.raise_.opset_steps import Conversion, adapter, dtype_of, obstacle


def _pop(node: ir.Node, name: str, default: Any = None) -> Any:
    attribute = node.attributes.pop(name, None)
    return default if attribute is None else attribute.value


def _set_input(node: ir.Node, index: int, value: ir.Value | None, to: Conversion) -> None:
    """Set an input that the node may not have had before; omitted ones at the end are cut off."""
    if len(node.inputs) <= index:
        node.resize_inputs(index + 1)
    to.edit.set_input(node, index, value)
    while node.inputs and node.inputs[-1] is None:
        node.resize_inputs(len(node.inputs) - 1)


# ---- attributes that became inputs


@adapter(
    *((f"Reduce{kind}", 18) for kind in ("L1", "L2", "LogSum", "LogSumExp", "SumSquare")),
    *((f"Reduce{kind}", 18) for kind in ("Max", "Mean", "Min", "Prod")),
    ("ReduceSum", 13),
    ("Squeeze", 13),
    ("Unsqueeze", 13),
    reads=("axes",),
)
def _axes_to_input(node: ir.Node, to: Conversion) -> None:
    # An empty list means the same as none in both forms; Unsqueeze must have one.
    axes = _pop(node, "axes")
    if axes or (axes is not None and node.op_type == "Unsqueeze"):
        _set_input(node, 1, to.integers(axes, "axes"), to)


@adapter(("Split", 13), reads=("split",))
def _split_to_input(node: ir.Node, to: Conversion) -> None:
    if sizes := _pop(node, "split"):
        _set_input(node, 1, to.integers(sizes, "split"), to)


@adapter(("Split", 18))
def _split_states_its_outputs(node: ir.Node, to: Conversion) -> None:
    if len(node.inputs) < 2 or node.inputs[1] is None:
        node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))


@adapter(("TopK", 10), reads=("k",))
def _topk_k_to_input(node: ir.Node, to: Conversion) -> None:
    _set_input(node, 1, to.integers([_pop(node, "k")], "k"), to)


@adapter(("Slice", 10), reads=("starts", "ends", "axes"))
def _slice_bounds_to_inputs(node: ir.Node, to: Conversion) -> None:
    for index, name in enumerate(("starts", "ends", "axes"), start=1):
        values = _pop(node, name)
        if values is not None:
            _set_input(node, index, to.integers(values, name), to)


@adapter(("Pad", 11), reads=("pads", "value", "mode"), asks_types=True)
def _pad_amounts_to_inputs(node: ir.Node, to: Conversion) -> None:
    value = _pop(node, "value", 0.0)
    _set_input(node, 1, to.integers(_pop(node, "pads"), "pads"), to)
    data = node.inputs[0]
    if value != 0.0 and data is not None:
        _set_input(node, 2, to.number_like(value, data, "value"), to)


_FLOAT_MAX = float(np.finfo(np.float32).max)


@adapter(("Clip", 11), reads=("min", "max"), asks_types=True)
def _clip_bounds_to_inputs(node: ir.Node, to: Conversion) -> None:
    data = node.inputs[0]
    assert data is not None
    # The old defaults, the limits of float32, bound float64 only.
    unbounded = dtype_of(data, to.facts) != ir.DataType.DOUBLE
    for index, (name, default) in enumerate((("min", -_FLOAT_MAX), ("max", _FLOAT_MAX)), start=1):
        bound = _pop(node, name, default)
        if not (unbounded and bound == default):
            _set_input(node, index, to.number_like(bound, data, name), to)


@obstacle(("Clip", 11), ("Pad", 11))
def _number_of_unknown_type(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    numbers = {"min", "max"} if node.op_type == "Clip" else {"value"}
    if target < 15 and numbers & set(node.attributes) and dtype_of(node.inputs[0], facts) is None:
        return "needs a constant of its input's element type, which isn't known (opset 15 or later can do without)"
    return None


@adapter(("DFT", 20), reads=("axis",))
def _dft_axis_to_input(node: ir.Node, to: Conversion) -> None:
    # The default changed from 1 to -2, so the axis is always written.
    _set_input(node, 2, to.integers(_pop(node, "axis", 1), "axis"), to)


@adapter(("Dropout", 12), reads=("ratio",))
def _dropout_ratio_to_input(node: ir.Node, to: Conversion) -> None:
    node.resize_outputs(1)
    ratio = np.asarray(_pop(node, "ratio", 0.5), dtype=np.float32)
    _set_input(node, 1, to.edit.constant(ratio, "ratio"), to)


@obstacle(("Dropout", 10), ("Dropout", 12))
def _dropout_mask(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    if _used_beyond_first(node):
        return "gives out its mask, which has no defined values in inference before opset 12"
    return None


def _used_beyond_first(node: ir.Node) -> bool:
    return any(out.uses() or out.is_graph_output() for out in node.outputs[1:])


# ---- normalizations


@adapter(("BatchNormalization", 9), reads=("spatial",))
def _batch_norm_is_spatial(node: ir.Node, to: Conversion) -> None:
    _pop(node, "spatial")


@obstacle(("BatchNormalization", 9))
def _batch_norm_per_activation(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    spatial = node.attributes.get("spatial")
    return "has spatial = 0, which opset 9 withdrew" if spatial is not None and spatial.value == 0 else None


@adapter(("BatchNormalization", 14))
def _batch_norm_in_inference(node: ir.Node, to: Conversion) -> None:
    node.resize_outputs(1)


@obstacle(("BatchNormalization", 14))
def _batch_norm_in_training(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    # Before opset 14 the presence of these outputs, used or not, is what asks for statistics of the batch.
    return "is in training form (it names its statistics outputs)" if any(v.name for v in node.outputs[1:]) else None


@adapter(("GroupNormalization", 21), reads=("num_groups",), asks_types=True)
def _group_norm_per_channel(node: ir.Node, to: Conversion) -> None:
    """Scale and bias had one number a group and have one a channel now; the sums were made in the input's type."""
    data = node.inputs[0]
    assert data is not None
    op = to.edit.op
    groups = node.attributes["num_groups"].value
    column = to.integers([groups, 1], "column")
    channels = op("Shape", [data], {"start": 1, "end": 2})
    per_group = op("Div", [channels, to.integers([groups], "groups")])
    shape = op("Concat", [to.integers([groups], "groups"), per_group], {"axis": 0})
    for index in (1, 2):
        wide = op("Expand", [op("Reshape", [node.inputs[index], column]), shape])
        to.edit.set_input(node, index, op("Reshape", [wide, channels]))
    dtype = dtype_of(data, to.facts)
    if dtype is not None and dtype != ir.DataType.FLOAT:
        node.attributes["stash_type"] = ir.AttrInt64("stash_type", int(dtype))


@obstacle(("LayerNormalization", 17))
def _scale_of_another_type(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    x, scale = dtype_of(node.inputs[0], facts), dtype_of(node.inputs[1], facts)
    return f"has a scale of {scale} for an input of {x}" if x is not None and scale not in (None, x) else None


@obstacle(("GroupNormalization", 21))
def _group_norm_of_unknown_type(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    return None if dtype_of(node.inputs[0], facts) else "is computed in its input's element type, which isn't known"


@adapter(("MeanVarianceNormalization", 13))
def _mean_variance_states_its_axes(node: ir.Node, to: Conversion) -> None:
    """The default is the same, but the checker of onnx (1.23) refuses a node of opset 13 and up that leaves it out."""
    if "axes" not in node.attributes:
        node.attributes["axes"] = ir.AttrInt64s("axes", [0, 2, 3])


# ---- softmax over two dimensions


@adapter(("Softmax", 13), ("LogSoftmax", 13), ("Hardmax", 13), reads=("axis",), asks_types=True)
def _softmax_of_rows(node: ir.Node, to: Conversion) -> None:
    """Before opset 13 all dimensions from `axis` on were one row; now `axis` is the only one.

    The two agree at the last dimension. Elsewhere: flatten, take the softmax of the rows, restore the shape.
    """
    data, result = node.inputs[0], node.outputs[0]
    assert data is not None
    axis = int(_pop(node, "axis", 1))
    shape = to.facts.shape(data)
    if axis == -1 or (shape is not None and axis == len(shape) - 1):
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
        return
    op = to.edit.op
    sizes = op("Shape", [data])
    rows = op(node.op_type, [op("Flatten", [data], {"axis": axis})], {"axis": -1})
    # allowzero: a 0 in the shape is an empty dimension, not "as in the input".
    restored = op("Reshape", [rows, sizes], {"allowzero": 1} if to.target >= 14 else None, like=result)
    to.replace(result, restored)


# ---- resizing


@adapter(("Upsample", 9), reads=("scales",))
def _upsample_scales_to_input(node: ir.Node, to: Conversion) -> None:
    _set_input(node, 1, to.edit.constant(np.asarray(_pop(node, "scales"), dtype=np.float32), "scales"), to)


@adapter(("Upsample", 10))
def _upsample_is_resize(node: ir.Node, to: Conversion) -> None:
    node.op_type = "Resize"


@adapter(("Resize", 11), reads=("mode",))
def _resize_states_its_grid(node: ir.Node, to: Conversion) -> None:
    """Opset 10 sampled at x / scale and took the neighbour below when it enlarged, the one above when it shrank."""
    scales = node.inputs[1]
    # Opset 13 made the region of interest optional.
    roi = None if to.target >= 13 else to.edit.constant(np.zeros(0, dtype=np.float32), "roi")
    _set_input(node, 2, scales, to)
    to.edit.set_input(node, 1, roi)
    node.attributes["coordinate_transformation_mode"] = ir.AttrString("coordinate_transformation_mode", "asymmetric")
    if _resize_mode(node) == "nearest":
        numbers = constant_array(scales, 16)
        shrinks = numbers is not None and bool((numbers < 1).any())
        node.attributes["nearest_mode"] = ir.AttrString("nearest_mode", "ceil" if shrinks else "floor")


def _resize_mode(node: ir.Node) -> str:
    mode = node.attributes.get("mode")
    return "nearest" if mode is None else mode.as_string()


@obstacle(("Resize", 11))
def _resize_both_ways(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    if _resize_mode(node) != "nearest":
        return None
    scales = constant_array(node.inputs[1], 16)
    if scales is None:
        return "takes nearest neighbours with scales that aren't constant (which neighbour depends on them)"
    if (scales < 1).any() and (scales > 1).any():
        return "takes nearest neighbours, enlarging one dimension and shrinking another"
    return None


@adapter(("Resize", 13))
def _resize_drops_empty_inputs(node: ir.Node, to: Conversion) -> None:
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        _set_input(node, 2, None, to)  # empty wherever sizes are given
    roi = constant_array(node.inputs[1], 0) if len(node.inputs) > 1 else None
    if roi is not None:
        _set_input(node, 1, None, to)


@obstacle(("Resize", 13))
def _resize_grid_withdrawn(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    grid = node.attributes.get("coordinate_transformation_mode")
    if grid is not None and not grid.is_ref() and grid.as_string() == "tf_half_pixel_for_nn":
        return "uses the coordinates 'tf_half_pixel_for_nn', which opset 13 withdrew"
    return None


@adapter(("RoiAlign", 16))
def _roi_align_states_its_grid(node: ir.Node, to: Conversion) -> None:
    name = "coordinate_transformation_mode"
    node.attributes[name] = ir.AttrString(name, "output_half_pixel")


@adapter(("GridSample", 20), reads=("mode",))
def _grid_sample_mode_names(node: ir.Node, to: Conversion) -> None:
    mode = _pop(node, "mode")
    if mode is not None:
        node.attributes["mode"] = ir.AttrString("mode", {"bilinear": "linear", "bicubic": "cubic"}.get(mode, mode))


# ---- the rest


@adapter(("Scatter", 11))
def _scatter_is_scatter_elements(node: ir.Node, to: Conversion) -> None:
    node.op_type = "ScatterElements"


@adapter(("Scan", 9), reads=("directions", "num_scan_inputs"))
def _scan_batches(node: ir.Node, to: Conversion) -> None:
    """Scan-8 ran its body for every element of the batch: a scan over the batch around a scan over the sequence."""
    edit = to.edit
    arguments = [v for v in node.inputs[1:] if v is not None]
    attributes = {"body": node.attributes["body"], "num_scan_inputs": node.attributes["num_scan_inputs"]}
    if (directions := _pop(node, "directions")) is not None:
        attributes["scan_input_directions"] = ir.AttrInt64s("scan_input_directions", directions)
    elements = [ir.Value(name=edit.names.fresh(f"{v.name}/element"), type=v.type) for v in arguments]
    results = [ir.Value(name=edit.names.fresh(f"{v.name}/element"), type=v.type) for v in node.outputs]
    name = edit.names.fresh(f"{node.name or 'Scan'}/sequence")
    inner = ir.Node("", "Scan", elements, list(attributes.values()), outputs=results, name=name)
    batch = ir.Graph(elements, results, nodes=[inner], name=edit.names.fresh(f"{node.name or 'Scan'}/batch"))
    node.attributes["body"] = ir.AttrGraph("body", batch)
    node.attributes["num_scan_inputs"] = ir.AttrInt64("num_scan_inputs", len(arguments))
    for index, value in enumerate(arguments):
        node.replace_input_with(index, value)
    node.resize_inputs(len(arguments))


@obstacle(("Scan", 9))
def _scan_lengths(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    if node.inputs[0] is not None:
        return "has sequence lengths, which opset 9 withdrew"
    return "omits an input" if any(v is None for v in node.inputs[1:]) else None


@obstacle(("QuantizeLinear", 19))
def _quantize_integers(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    if target < 23 and dtype_of(node.inputs[0], facts) == ir.DataType.INT32:
        return "quantizes int32 by a float scale, which opsets 19 to 22 don't allow"
    return None


@obstacle(("Erf", 13))
def _erf_of_integers(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    dtype = dtype_of(node.inputs[0], facts)
    return "takes integers, which opset 13 withdrew" if dtype is not None and not dtype.is_floating_point() else None


@obstacle(("Cast", 24))
def _cast_of_infinity(node: ir.Node, facts: ShapeFacts, target: int) -> str | None:
    to = node.attributes.get("to")
    if to is None or to.is_ref() or to.value not in (ir.DataType.FLOAT8E4M3FNUZ, ir.DataType.FLOAT8E5M2FNUZ):
        return None
    return "casts to a type for which opset 24 changed what infinity becomes"
