"""Adapters merged into the weights of their base, each weight when it is read."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import onnx_ir as ir

from graphopt.errors import UsageError
from graphopt.export.adapters.checkpoint import TOKENS, Adapter
from graphopt.export.adapters.experts import Stacked, stacked_target
from graphopt.export.adapters.projections import shared_tensors
from graphopt.export.adapters.site import Array, Site
from graphopt.export.adapters.targets import (
    Names,
    Target,
    saved_whole,
    shape_text,
    target_of,
    token_indices,
    unmatched,
)
from graphopt.export.adapters.transforms import trainable_tokens
from graphopt.export.weights import Weights

BLOCK_BYTES = 64_000_000
"""A product of two matrices is added to so many bytes of the weight (in float32) at a time."""

_MERGED_INTO = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)

Given = Adapter | str | Path | tuple[Adapter | str | Path, float]


class AdaptedWeights:
    """The weights of a base with adapters merged in (the `Weights` protocol).

    A weight is merged when it is read, in float32 (what inverts or decomposes in float64), and given back in the
    base's type. Of low-rank adapters, DoRA, OFT and HRA only a block of the weight is in float32 at a time; the others
    need the whole weight in float32, two to four times.

    Several adapters are summed, W' = W + Σᵢ wᵢ ΔWᵢ, which for LoRA is what peft's `add_weighted_adapter` with "cat"
    gives; those that multiply or replace a weight don't sum and can only be merged alone, with weight 1.

    Weights that the base ties (gives as one object under several names) are taken as the adapter's modules: a change of
    the embedding alone unties it from the head, as it is when peft runs the adapter. Rows of tokens go into both.

    Attributes:
        notes: What a user should know: entries of `target_modules` that named no module.
        untied: Pairs of names that are one weight of the base and now differ.
    """

    def __init__(self, base: Weights, adapters: Given | Sequence[Given], *, turned: Collection[str] = ()) -> None:
        """Find out which weights the adapters change, without reading any.

        Args:
            base: The weights of the model that the adapters were trained on.
            adapters: A folder or an `Adapter`, or several, each also as (folder, weight).
            turned: Names of weights that are stored as [in, out] (those of transformers' Conv1D). Needed only for
                square ones where the configuration's `fan_in_fan_out` doesn't tell it: the shapes tell it of others.

        Raises:
            UsageError: An adapter of another base, of a method that can't be merged, or several that don't sum.
            ModelError: A broken file.
        """
        self._base = base
        self._adapters = opened(adapters)
        self._targets: dict[str, list[Target]] = {}
        self._experts: dict[str, list[Stacked]] = {}
        self._biases: dict[str, list[tuple[Target, str]]] = {}
        self._tokens: dict[str, tuple[Adapter, str]] = {}
        self._replaced: dict[str, tuple[Adapter, str]] = {}
        self.notes: list[str] = []
        known = self._known = dict.fromkeys(base.names())
        for adapter, share in self._adapters:
            names = Names(adapter, known)
            self._plan(adapter, share, names, turned)
            self._plan_replaced(adapter, names, known)
            self.notes.extend(unmatched(adapter, known))
        ties = _ties(base, known)
        for name in list(self._tokens):
            self._tokens.update({other: self._tokens[name] for other in ties.get(name, ())})
        changed = self.changed()
        self.untied = tuple(
            (name, other)
            for name, others in ties.items()
            for other in others
            if name not in self._tokens and name in changed and (other not in changed or name < other)
        )
        self._check_sums()
        self._shared = {}
        for adapter, _ in self._adapters:
            targets = [t for found in self._targets.values() for t in found if t.adapter is adapter]
            self._shared[id(adapter)] = shared_tensors(adapter, [(t.outputs, t.inputs) for t in targets])
        self._names = [*base.names(), *(name for name in self._replaced if name not in known)]

    def names(self) -> Collection[str]:
        """The base's names, and those that only an adapter has (a new classifier)."""
        return self._names

    def changed(self) -> Collection[str]:
        """The names of the parameters that differ from the base's."""
        return dict.fromkeys([*self._targets, *self._experts, *self._biases, *self._tokens, *self._replaced])

    def tensor(self, name: str) -> ir.TensorProtocol:
        """The merged weight, read and merged when its data is asked for; what no adapter changes is the base's own."""
        replaced = self._replaced.get(name)
        if name not in self._known:
            if replaced is None:
                return self._base.tensor(name)  # which says that there is none
            adapter, key = replaced
            shape = ir.Shape(adapter.shapes[key])
            whole = functools.partial(_tensor, adapter, key, name)
            return ir.LazyTensor(whole, dtype=ir.DataType.FLOAT, shape=shape, name=name)
        before = self._base.tensor(name)
        if name not in self.changed():
            return before

        def merged() -> ir.TensorProtocol:
            array = before.numpy() if replaced is None else replaced[0].array(replaced[1])
            found = self._merged(name, array, before.dtype.numpy())
            return ir.Tensor(found, dtype=before.dtype, name=name)

        return ir.LazyTensor(merged, dtype=before.dtype, shape=ir.Shape(before.shape.numpy()), name=name)

    # ---- planning

    def _plan(self, adapter: Adapter, share: float, names: Names, turned: Collection[str]) -> None:
        method = adapter.method

        def shape_of(name: str) -> tuple[int, ...]:
            tensor = self._base.tensor(name)
            if tensor.dtype not in _MERGED_INTO:
                raise UsageError(
                    f"the base's {name} is stored as {tensor.dtype.name}, which {adapter.folder} can't be merged into; "
                    "dequantize the base"
                )
            return tuple(tensor.shape.numpy())

        for module, keys in adapter.modules.items():
            if stacked := names.stacked(module):
                name, one = stacked_target(adapter, share, module, stacked, shape_of, turned.__contains__)
                self._experts.setdefault(name, []).append(one)
                continue
            weight = names.weight(module)
            if TOKENS in keys:
                if weight in self._tokens:
                    raise UsageError(
                        f"{adapter.folder} and {self._tokens[weight][0].folder} both replace rows of {weight}; merge "
                        "one of them"
                    )
                self._tokens[weight] = (adapter, module)
                self._check_rows(adapter, keys[TOKENS], weight)
                if len(keys) == 1:
                    continue
            times = share * names.times(module)
            target = target_of(adapter, times, module, weight, shape_of(weight), weight in turned)
            if method.factors or method.delta or method.transform:
                self._targets.setdefault(weight, []).append(target)
            if method.bias is not None:
                self._plan_bias(target, names, module)

    def _plan_bias(self, target: Target, names: Names, module: str) -> None:
        bias = names.bias(module)
        keys = target.adapter.modules[module]
        needed = next((n for n in ("lora_B.bias", "beft_bias") if n in keys), None)
        if bias is not None and not (target.adapter.config["peft_type"] == "LORA" and needed is None):
            self._biases.setdefault(bias, []).append((target, names.weight(module)))
        elif bias is None and needed is not None:
            raise UsageError(
                f"{target.adapter.folder} adds a bias to {module} ({needed}), and the base has none there to add it to"
            )

    def _plan_replaced(self, adapter: Adapter, names: Names, known: Collection[str]) -> None:
        for parameter, key in adapter.replaced.items():
            name = names.parameter(parameter)
            if name in known:
                have, want = adapter.shapes[key], tuple(self._base.tensor(name).shape.numpy())
                if have != want:
                    raise UsageError(
                        f"{adapter.folder} is of another base: {key} is {shape_text(have)}, where the base's {name} is "
                        f"{shape_text(want)}"
                    )
            elif not saved_whole(adapter, parameter):
                raise UsageError(
                    f"{adapter.folder} is of another base: it has {key}, and the base has no parameter {name}"
                )
            if name in self._replaced:
                raise UsageError(
                    f"{adapter.folder} and {self._replaced[name][0].folder} both replace {name}; merge one of them"
                )
            self._replaced[name] = (adapter, key)

    def _check_rows(self, adapter: Adapter, key: str, weight: str) -> None:
        rows, shape = adapter.shapes[key], tuple(self._base.tensor(weight).shape.numpy())
        indices = token_indices(adapter, key)
        if len(shape) != 2 or rows != (indices.size, shape[1]) or (indices.size and indices.max() >= shape[0]):
            raise UsageError(
                f"{adapter.folder} is of another base: {key} is {shape_text(rows)} for {indices.size} tokens, where "
                f"the base's {weight} is {shape_text(shape)}"
            )

    def _check_sums(self) -> None:
        for name, targets in self._targets.items():
            alone = [t.adapter for t in targets if not t.adapter.method.adds or name in self._tokens]
            if alone and (len(targets) > 1 or targets[0].share != 1):
                raise UsageError(
                    f"{alone[0].folder} changes {name} by more than adding to it, so it can only be merged alone and "
                    "with weight 1"
                )
        for adapter, share in self._adapters:
            if share != 1 and (adapter.replaced or any(TOKENS in keys for keys in adapter.modules.values())):
                raise UsageError(
                    f"{adapter.folder} replaces whole parameters, so it can't be merged with weight {share:g}"
                )

    # ---- merging

    def _merged(self, name: str, array: Array, dtype: np.dtype) -> Array:
        targets = self._targets.get(name, [])
        if name in self._tokens:
            adapter, module = self._tokens[name]
            key = adapter.modules[module][TOKENS]
            array = trainable_tokens(token_indices(adapter, key), adapter.array(key).astype(dtype), array)
        for target, weight in self._biases.get(name, []):
            site = self._site(target)
            bias = target.adapter.method.bias
            assert bias is not None
            before = array.astype(np.float32)
            with target.fitting():
                after = bias(site, before, functools.partial(self._base_matrix, weight, target))
            array = before + np.float32(target.share) * (after - before) if target.share != 1 else after
        # Rounded to the base's type once, by the last of them.
        experts = self._experts.get(name, [])
        for one in experts:
            array = one.added(array, dtype if one is experts[-1] else np.dtype(np.float32))
        low = [t for t in targets if t.adapter.method.factors is not None]
        others = [t for t in targets if t.adapter.method.factors is None]
        if low:
            array = self._low_rank(low, array, np.dtype(np.float32) if others else dtype)
        for target in others:
            if target.adapter.method.by_rows and not target.turned:
                array = self._by_rows(target, array, dtype)
            else:
                array = self._whole(target, array)
        return np.ascontiguousarray(array.astype(dtype, copy=False))

    def _low_rank(self, targets: list[Target], array: Array, dtype: np.dtype) -> Array:
        """W + B A, and scaled row by row for DoRA, block by block of the weight as it is stored."""
        left, right, sites = [], [], []
        for target in targets:
            assert target.adapter.method.factors is not None
            site = self._site(target)
            with target.fitting():
                b, a = target.adapter.method.factors(site)
                if (b.shape[0], a.shape[1], b.shape[1]) != (target.outputs, target.inputs, a.shape[0]):
                    raise ValueError(f"the product is one of {shape_text(b.shape)} and {shape_text(a.shape)}")
            b = b * np.float32(target.share) if target.share != 1 else b
            left.append(a.T if target.turned else b)
            right.append(b.T if target.turned else a)
            sites.append(site)
        rows, columns = np.concatenate(left, axis=1), np.concatenate(right, axis=0)
        stored = array.reshape(array.shape[0], -1)
        blocks = _blocks(stored)

        def block(part: slice) -> Array:
            return np.asarray(stored[part].astype(np.float32) + rows[part] @ columns)

        out = np.empty(stored.shape, dtype)
        key = targets[0].adapter.method.magnitude
        if key is None:
            for part in blocks:
                out[part] = block(part)
            return out.reshape(array.shape)
        # "DoRA: Weight-Decomposed Low-Rank Adaptation": W' = diag(m / ‖W + ΔW‖ of each output) (W + ΔW)
        magnitude = sites[0].tensors[key].reshape(-1)
        if targets[0].turned:
            squares = sum(np.square(block(part), dtype=np.float64).sum(0) for part in blocks)
            scale = (magnitude / np.sqrt(squares)).astype(np.float32)
            for part in blocks:
                out[part] = block(part) * scale
        else:
            for part in blocks:
                found = block(part)
                out[part] = found * (magnitude[part] / np.linalg.norm(found, axis=1))[:, None]
        return out.reshape(array.shape)

    def _by_rows(self, target: Target, array: Array, dtype: np.dtype) -> Array:
        """f(W) block by block of its rows."""
        transform, site = target.adapter.method.transform, self._site(target)
        assert transform is not None
        stored = array.reshape(array.shape[0], -1)
        out = np.empty(stored.shape, dtype)
        with target.fitting():
            for part in _blocks(stored):
                out[part] = transform(site, stored[part].astype(np.float32))
        return out.reshape(array.shape)

    def _whole(self, target: Target, array: Array) -> Array:
        method, site = target.adapter.method, self._site(target)
        weight = _matrix(array, target.turned)
        with target.fitting():
            if method.delta is not None:
                delta = method.delta(site)
                found = weight + (delta if target.share == 1 else np.float32(target.share) * delta)
            else:
                assert method.transform is not None
                found = method.transform(site, weight)
            if found.shape != weight.shape:
                raise ValueError(f"the formula gives {shape_text(found.shape)}")
        return np.asarray((found.T if target.turned else found).reshape(array.shape))

    def _base_matrix(self, name: str, target: Target) -> Array:
        return _matrix(self._base.tensor(name).numpy(), target.turned)

    def _site(self, target: Target) -> Site:
        return target.site(self._shared[id(target.adapter)])


def opened(adapters: Given | Sequence[Given]) -> list[tuple[Adapter, float]]:
    """Adapters with their weights, opened where folders were given."""
    pair = isinstance(adapters, tuple) and len(adapters) == 2 and isinstance(adapters[1], int | float)
    given = (
        [adapters] if pair or isinstance(adapters, Adapter | str | Path) else list(cast("Sequence[Given]", adapters))
    )
    found: list[tuple[Adapter, float]] = []
    for item in cast("list[Given]", given):
        one, share = item if isinstance(item, tuple) else (item, 1.0)
        found.append((one if isinstance(one, Adapter) else Adapter(one), float(share)))
    return found


def _ties(base: Weights, names: Collection[str]) -> dict[str, list[str]]:
    """For each name the others that the base gives the same tensor for."""
    tensors = {name: base.tensor(name) for name in names}
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    tied = [group for group in groups.values() if len(group) > 1]
    return {name: [other for other in group if other != name] for group in tied for name in group}


def _blocks(stored: Array) -> list[slice]:
    step = max(1, BLOCK_BYTES // 4 // max(1, stored.shape[1]))
    return [slice(i, min(i + step, len(stored))) for i in range(0, len(stored), step)]


def _tensor(adapter: Adapter, key: str, name: str) -> ir.TensorProtocol:
    return ir.Tensor(adapter.array(key), name=name)


def _matrix(array: Array, turned: bool) -> Array:
    matrix = array.reshape(array.shape[0], -1)
    return np.asarray((matrix.T if turned else matrix), np.float32)
