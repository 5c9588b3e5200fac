"""Which tensors of a checkpoint make up which weights of a module, by transformers' own tables, and lazily."""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from graphopt.errors import ModelError, first_line
from graphopt.export.dependencies import quiet, require
from graphopt.export.torch_tensors import as_array, as_torch, ir_dtype, torch_dtype
from graphopt.graph.load import MappedTensor
from graphopt.graph.streamed import Array, StreamedTensor, transposed


@dataclass
class _Conversion:
    """One use of one of transformers' converters: the tensors that go into it, by the pattern that each one matched."""

    converter: Any
    module: Any
    target: str
    sources: dict[str, list[MappedTensor]] = field(default_factory=lambda: defaultdict(list))

    def run(self, tensors: Mapping[str, list[Any]]) -> dict[str, Any]:
        """The torch tensors that the converter makes of torch tensors, by the module's names."""
        converter = copy.copy(self.converter)
        converter.collected_tensors, converter.layer_targets = defaultdict(list), defaultdict(set)
        for pattern, members in tensors.items():
            for member in members:
                converter.add_tensor(self.target, self.target, pattern, member)
        made = converter.convert(self.target, model=self.module, config=self.module.config)
        if isinstance(made, tuple):  # transformers 5.0 returns its errors beside the tensors.
            made = made[0]
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def results(self) -> dict[str, ir.TensorProtocol]:
        """What the converter makes, each as a tensor that is read or computed when it is asked for.

        Shapes and types come from a run of the converter on tensors without data.
        """
        torch = require("torch")
        blank = {
            pattern: [torch.empty(t.shape.numpy(), dtype=torch_dtype(t.dtype), device="meta") for t in members]
            for pattern, members in self.sources.items()
        }
        places = {
            value.untyped_storage()._cdata: source
            for pattern, values in blank.items()
            for value, source in zip(values, self.sources[pattern], strict=True)
        }
        made = self.run(blank)
        found: dict[str, ir.TensorProtocol] = {}
        for name, value in made.items():
            shape, dtype = ir.Shape(value.shape), ir_dtype(value.dtype)
            source = places.get(value.untyped_storage()._cdata)
            # A part of the file as it stands there (no operation has written to it), such as one of the weights that
            # were fused along the rows, needs no computing.
            if source is not None and value.is_contiguous() and dtype == source.dtype and value._version == 0:
                size = value.element_size()
                begin, length = (source.offset or 0) + value.storage_offset() * size, value.numel() * size
                found[name] = MappedTensor(
                    source.location, begin, length, dtype, shape=shape, name=name, base_dir=source.base_dir
                )
            else:
                by_expert = len(made) == 1 and self._by_expert(value.shape)
                make = self._of_experts if by_expert else self._of_all
                found[name] = make(name, dtype, tuple(value.shape))
        return found

    def _by_expert(self, shape: tuple[int, ...]) -> bool:
        """Whether each index of the result's first dimension is made of one tensor of each pattern.

        That is so where the tensors are stacked first, and nothing later touches the dimension that this makes.
        """
        # An expert's scales come with its weights, so that dequantizing goes expert by expert too.
        operations = [op for op in self.converter.operations if not type(op).__name__.endswith("Dequantize")]
        if not operations or type(operations[0]).__name__ != "MergeModulelist" or operations[0].dim != 0:
            return False
        if {len(members) for members in self.sources.values()} != {shape[0]}:
            return False
        axes = {"Concatenate": ("dim",), "Interleave": ("dim",), "Transpose": ("dim0", "dim1")}
        return all(
            type(operation).__name__ in axes
            and all(getattr(operation, axis) >= 1 for axis in axes[type(operation).__name__])
            and not getattr(operation, "check_dims", False)
            for operation in operations[1:]
        )

    def _of_all(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> StreamedTensor:
        """One of the results, computed with all others."""

        def blocks() -> Iterator[Array]:
            mapped = {pattern: [as_torch(t) for t in members] for pattern, members in self.sources.items()}
            yield as_array(self.run(mapped)[name])

        return StreamedTensor(blocks, dtype, ir.Shape(shape), name)

    def _of_experts(
        self, name: str, dtype: ir.DataType, shape: tuple[int, ...], order: Sequence[int] | None = None
    ) -> StreamedTensor:
        """The result with its axes in an order that leaves the first in place, computed one expert at a time."""
        axes = tuple(order or range(len(shape)))

        def blocks() -> Iterator[Array]:
            for index in range(shape[0]):
                mapped = {pattern: [as_torch(members[index])] for pattern, members in self.sources.items()}
                yield as_array(self.run(mapped)[name]).transpose(axes)

        def moved(more: Sequence[int]) -> ir.TensorProtocol:
            if more[0] != 0:
                return transposed(StreamedTensor(blocks, dtype, ir.Shape(sizes), name), more)
            return self._of_experts(name, dtype, shape, [axes[axis] for axis in more])

        sizes = [shape[axis] for axis in axes]
        return StreamedTensor(blocks, dtype, ir.Shape(sizes), name, moved=moved)


def plan(
    stored: Mapping[str, MappedTensor], module: Any, own: Mapping[str, Any], quantizer: Any = None
) -> tuple[dict[str, ir.TensorProtocol], set[str]]:
    """The weights of a module that the tensors of a checkpoint give.

    This follows `transformers.core_model_loading.convert_and_load_state_dict_in_model`: renamings, at most one
    converter, the prefix of the base model.

    Args:
        stored: The tensors of the checkpoint by their names in it.
        module: The module.
        own: Its state_dict.
        quantizer: transformers' quantizer where the tensors are quantized.

    Returns:
        The weights by the module's names, and the names of tensors that it has no place for.

    Raises:
        ModelError: The tensors don't fit what transformers would make of them.
    """
    tables = _tables(module, quantizer)
    if tables is None:
        given = {name: tensor for name, tensor in stored.items() if name in own}
        return {**given}, set(stored) - set(own)
    loading, renamings, converters, prefix = tables
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    weights: dict[str, ir.TensorProtocol] = {}
    conversions: dict[str, _Conversion] = {}
    unexpected: set[str] = set()
    for key in sorted(stored, key=loading.dot_natural_key):
        name, pattern = loading.rename_source_key(key, renamings, converters, prefix, own)
        if name not in own and key in own:
            name, pattern = loading.rename_source_key(key, [], [], prefix, own)
        if name in own and pattern is None:
            weights.setdefault(name, stored[key])
        elif name in own:
            conversion = conversions.setdefault(name, _Conversion(by_pattern[pattern], module, name))
            conversion.sources[pattern].append(stored[key])
        elif pattern is None:
            unexpected.add(name)
        else:
            targets = by_pattern[pattern].target_patterns
            unexpected.update(name.replace(targets[0], target) for target in targets)
    for name, conversion in conversions.items():
        try:
            results = conversion.results()
        except Exception as error:
            members = [t.name for tensors in conversion.sources.values() for t in tensors]
            raise ModelError(
                f"the weight {name} can't be made of {len(members)} tensors of the checkpoint ({members[0]}, ...): "
                f"{first_line(error)}"
            ) from error
        weights.update({target: tensor for target, tensor in results.items() if target in own})
        unexpected.update(target for target in results if target not in own)
    return weights, _of_use(unexpected, module)


def _tables(module: Any, quantizer: Any) -> tuple[Any, list[Any], list[Any], str | None] | None:
    """transformers' functions, and its renamings, converters and prefix for a module; None for one of another kind."""
    transformers = require("transformers")
    if not isinstance(module, transformers.PreTrainedModel):
        return None
    loading, mapping = require("transformers.core_model_loading"), require("transformers.conversion_mapping")
    with quiet():
        transforms = mapping.get_model_conversion_mapping(module, hf_quantizer=quantizer) or []
    renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
    return loading, renamings, converters, module.base_model_prefix or None


def _of_use(unexpected: set[str], module: Any) -> set[str]:
    """Without the names that the module's class declares of no use, and those of buffers that checkpoints once had."""
    patterns = set(module._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in module.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.add(r"(^|\.)position_ids$")
    return {name for name in unexpected if not any(re.search(pattern, name) for pattern in patterns)}
