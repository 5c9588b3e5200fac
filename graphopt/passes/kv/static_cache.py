"""The cache of ONNX Runtime's GroupQueryAttention in 8 or 4 bits, with static scales."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.calibration.cache_ranges import cache_ranges
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.text import TextDataset
from graphopt.errors import UsageError
from graphopt.graph.edits import Editor
from graphopt.graph.kv_interface import kv_interface
from graphopt.runtime_ops.memory_session import make_session

GROUP_QUERY = "com.microsoft::GroupQueryAttention"
_KEY, _VALUE, _KEY_SCALE, _VALUE_SCALE = 3, 4, 12, 13
_QUANTIZED = (ir.DataType.INT8, ir.DataType.UINT8)


class StaticCaches:
    """Gives the operators of a model caches of integers; one scale for each channel is calibrated on text."""

    def __init__(self, model: ir.Model, edit: Editor, bits: int, calibration: Calibration | None, windows: int) -> None:
        """Run the model on the text.

        Args:
            model: The model, with caches of floats still.
            edit: Its editor.
            bits: Of a number in the cache: 8, or 4 (two in a byte).
            calibration: The text.
            windows: Windows of it that are looked at.

        Raises:
            ModelError, InputDataError: The model is no decoder, or doesn't run.
            UsageError: The data is no text.
        """
        self._graph, self._edit, self._bits = model.graph, edit, bits
        self._ranges: dict[str, npt.NDArray[Any]] = {}
        sites = [node for node in model.graph if _is_site(node)]
        interface = kv_interface(model) if sites else None
        if interface is not None and calibration is not None:
            data = calibration.data
            if not isinstance(data, TextDataset):
                raise UsageError("The scales of a quantized cache are calibrated on text: give a .txt or .jsonl file.")
            self._ranges = cache_ranges(make_session(model), interface, data, windows)

    def obstacle(self, node: ir.Node) -> str | None:
        """Why a GroupQueryAttention keeps its cache; "": it has none of floats; None: it gets another."""
        if not _is_site(node):
            return ""
        if node.graph is not self._graph:
            return "it stands in a subgraph or function"
        for past, present in zip(node.inputs[_KEY : _VALUE + 1], node.outputs[1:3], strict=True):
            assert past is not None
            if not past.is_graph_input() or not present.is_graph_output():
                return "it isn't an input and an output of the model"
            others = [user for value in (past, present) for user, _ in value.uses() if user is not node]
            others = [user for user in others if user not in _later_layers(node)]
            if any(user.op_type != "Shape" or (self._bits == 4 and _asks_for_depth(user)) for user in others):
                return f"{past.name!r} or {present.name!r} is read by something else too"
            if past.name not in self._ranges:
                return f"no numbers of {past.name!r} were seen"
            if self._bits == 4 and self._ranges[past.name].shape[1] % 2:
                return "an odd number of features can't be packed in pairs"
        return None

    def write(self, node: ir.Node) -> None:
        """Give a GroupQueryAttention without obstacle its new cache, which later layers that read it are told of."""
        self._edit.at(node)
        readers = [node, *_later_layers(node)]
        for reader in readers:
            for name, value in (("k_quant_type", "PER_CHANNEL"), ("v_quant_type", "PER_CHANNEL")):
                reader.attributes[name] = ir.AttrString(name, value)
            reader.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", self._bits)
            reader.resize_inputs(_VALUE_SCALE + 1)
            if len(reader.outputs) < 3:  # the operator refuses to be without, where they are quantized
                reader.resize_outputs(3)
                for output in reader.outputs[1:]:
                    output.name = self._edit.names.fresh(f"{reader.name}/present")
        for place, scale in ((_KEY, _KEY_SCALE), (_VALUE, _VALUE_SCALE)):
            past, present = node.inputs[place], node.outputs[place - _KEY + 1]
            assert past is not None
            largest = self._ranges[past.name or ""]
            scales = np.maximum(largest, 1e-6) / (2 ** (self._bits - 1) - 1)
            constant = self._edit.constant(scales[None, :, None].astype(np.float32), "scales")
            for reader in readers:
                reader.replace_input_with(scale, constant)
            for cache in (past, present):
                cache.type = ir.TensorType(ir.DataType.INT8 if self._bits == 8 else ir.DataType.UINT8)
                sizes = [None] * 4 if cache.shape is None else list(cache.shape)
                sizes[3] = largest.shape[1] * self._bits // 8
                cache.shape = ir.Shape(sizes)


def _is_site(node: ir.Node) -> bool:
    if node.op_type != "GroupQueryAttention" or node.domain != "com.microsoft" or len(node.inputs) <= _VALUE:
        return False
    pasts = [node.inputs[_KEY], node.inputs[_VALUE]]
    return len(node.outputs) > 2 and all(past is not None and past.dtype not in _QUANTIZED for past in pasts)


def _later_layers(node: ir.Node) -> list[ir.Node]:
    """The attentions that read the present of `node` as their past (see `share-kv`)."""
    key, value = node.outputs[1:3]
    users = dict.fromkeys(user for user, _ in key.uses() if user.op_type == "GroupQueryAttention")
    return [user for user in users if user.inputs[_KEY] is key and user.inputs[_VALUE] is value]


def _asks_for_depth(shape: ir.Node) -> bool:
    return 3 in range(4)[attribute_int(shape, "start", 0) : attribute_int(shape, "end", 4)]
