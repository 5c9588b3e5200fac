"""How many attentions a PyTorch module runs, counted while it runs: nothing of graphopt takes part.

Every tensor carries what it is made of: `weight` (parameters alone), `score` (a product of two activations, then only
element-wise or moved), `weighted` (a score that went through a non-linear function). A product of a `weighted` tensor
with an activation ends an attention. torch's own attention operators count as one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_PRODUCTS = ("mm", "bmm", "matmul", "baddbmm", "addmm", "einsum", "dot", "mv")
_SOFTMAX = ("_softmax", "_log_softmax", "_safe_softmax", "exp")
_OTHER = ("softplus", "relu", "sigmoid", "gelu", "elu")
_FUSED = "scaled_dot_product"
_SUMS = ("sum", "mean", "amax", "argmax", "topk", "convolution", "native_layer_norm", "isnan")


@dataclasses.dataclass
class Sites:
    """Attentions with a softmax, and with something else."""

    softmax: int = 0
    others: int = 0


class _Counter(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        # Tensors are kept alive, so that an id stays one tensor's.
        self.kept: list[Any] = []
        self.marks: dict[int, frozenset[str]] = {}
        self.sites = Sites()
        self.storages = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}

    def mark(self, tensor: torch.Tensor) -> frozenset[str]:
        known = self.marks.get(id(tensor))
        if known is not None:
            return known
        return frozenset({"weight"} if tensor.untyped_storage().data_ptr() in self.storages else ())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = (
            func.overloadpacket.__name__.rstrip("_")
            if not func.overloadpacket.__name__.startswith("_")
            else func.overloadpacket.__name__
        )
        given = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        marks = [self.mark(v) for v in given]
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.kept.append(value)
                self.marks[id(value)] = self.outcome(name, marks)
        if _FUSED in name:
            self.sites.softmax += 1
        elif name in _PRODUCTS and len(marks) >= 2:
            left, right = marks[-2:]
            for one, other in ((left, right), (right, left)):
                if "weight" not in other and {"softmax", "other"} & one:
                    if "mixed" in one or "softmax" not in one:
                        self.sites.others += 1
                    else:
                        self.sites.softmax += 1
                    break
        return result

    def outcome(self, name: str, marks: list[frozenset[str]]) -> frozenset[str]:
        """The mark of what an operator gives."""
        if not marks:
            return frozenset({"weight"})
        if all("weight" in m for m in marks):
            return frozenset({"weight"})
        if name in ("index", "index_select"):
            return marks[0]  # an expert's weights stay weights
        if _FUSED in name:
            return frozenset()
        if name in _PRODUCTS:
            left, right = marks[-2:]
            if "weight" in left or "weight" in right:
                # A linear map of scores mixes them: of heads, where heads stand last.
                held = left | right
                return (
                    frozenset({*(held & {"score", "softmax", "other"}), "mixed"}) if {"score"} & held else frozenset()
                )
            if {"softmax", "other"} & (left | right):
                return frozenset()
            return frozenset({"score"})
        joined = frozenset().union(*marks) - {"weight"}
        if name in _SUMS:
            return frozenset()
        if "score" in joined and name in _SOFTMAX:
            return joined | {"softmax"}
        if "score" in joined and name in _OTHER:
            return joined | {"other"}
        return joined


def count_sites(module: torch.nn.Module, arguments: Sequence[torch.Tensor]) -> dict[str, int]:
    """Run the module once and count."""
    torch.backends.mha.set_fastpath_enabled(False)
    counter = _Counter(module)
    with torch.no_grad(), counter:
        module(*arguments)
    return dataclasses.asdict(counter.sites)
