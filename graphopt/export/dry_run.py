"""What a module returns, by shape and type, without computing it: how inputs and outputs are found out.

A dry run goes through the module's own code on tensors without numbers, so it takes no memory for weights and costs
milliseconds per layer, whatever the size of the model. Code that asks for a number (`if mask.any()`) can't be run dry.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from graphopt.export.dependencies import quiet, require


def dry_run(module: Any, call: Callable[..., Any], tensors: Sequence[Any]) -> Any:
    """What `call(*tensors)` returns, its tensors with shape and dtype but without numbers.

    Args:
        module: The torch module that `call` runs; attributes and buffers that it sets on itself are set back.
        call: Runs the module.
        tensors: Tensors of which shape and dtype count.

    Raises:
        Exception: Whatever the module's code raises for these shapes; `ValueError` where it asks for a number.
    """
    with _mode(module) as mode:
        return call(*(mode.from_tensor(tensor) for tensor in tensors))


def used(module: Any, call: Callable[..., Sequence[Any]], tensors: Sequence[Any]) -> list[bool]:
    """For each tensor, whether a number of it goes into what `call(*tensors)`, a sequence of tensors, returns.

    A tensor of which only the shape is read isn't used. Views and writes in place are followed by the memory that they
    share, so a tensor may count as used that isn't, never the other way round.

    Raises:
        Exception: As `dry_run`.
    """
    torch = require("torch")
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    reached: dict[int, set[int]] = {}
    alive: list[Any] = []  # An address that is free could be given to another tensor.

    def key(tensor: Any) -> int:
        return int(tensor.untyped_storage()._cdata)

    class Follow(TorchDispatchMode):  # type: ignore[misc]
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            given = [t for t in tree_leaves((args, kwargs or {})) if isinstance(t, torch.Tensor)]
            if _reads_shape_only(function):
                given = []
            sources = set().union(*(reached.get(key(t), set()) for t in given))
            if sources:
                made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
                # Written in place: the arguments that the operator's schema says it changes.
                schema = function._schema
                if schema.is_mutable:
                    made += [t for t, a in zip(args, schema.arguments, strict=False) if a.alias_info]
                for tensor in made:
                    if isinstance(tensor, torch.Tensor):
                        alive.append(tensor)
                        reached.setdefault(key(tensor), set()).update(sources)
            return result

    with _mode(module) as mode:
        fake = [mode.from_tensor(tensor) for tensor in tensors]
        for index, tensor in enumerate(fake):
            reached.setdefault(key(tensor), set()).add(index)
        with Follow():
            returned = call(*fake)
        found = set().union(*(reached.get(key(t), set()) for t in returned))
    return [index in found for index in range(len(tensors))]


def _reads_shape_only(function: Any) -> bool:
    """`zeros_like(x)`, `x.new_ones(...)` and their kind."""
    name = function._schema.name.partition("::")[2]
    return bool(name.startswith("new_") or name.endswith("_like"))


@contextlib.contextmanager
def _mode(module: Any) -> Iterator[Any]:
    """torch's mode of tensors without numbers; what the module sets on itself meanwhile is taken back."""
    torch = require("torch")
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )

    before = [(m, dict(vars(m)), _tables(m)) for m in module.modules()]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with quiet(), torch.no_grad(), _nothing_remembered(), mode:
            yield mode
    except (DataDependentOutputException, DynamicOutputShapeException):
        raise ValueError("its code decides by numbers in its inputs, which no trace can hold") from None
    finally:
        for m, attributes, tables in before:
            vars(m).clear()
            vars(m).update(attributes)
            for table, held in tables:
                table.clear()
                table.update(held)


@contextlib.contextmanager
def _nothing_remembered() -> Iterator[None]:
    """transformers remembers results that depend on sizes alone (tables of positions), unless it's being compiled."""
    functions = require("transformers").pytorch_utils
    before = getattr(functions, "is_torchdynamo_compiling", None)
    if before is None:
        yield
        return
    functions.is_torchdynamo_compiling = lambda: True
    try:
        yield
    finally:
        functions.is_torchdynamo_compiling = before


def _tables(module: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What the module may put things into, and copies of it.

    Buffers, hooks (transformers hangs up its own when it first needs them), and dictionaries of its own, such as
    LeViT's of biases by device.
    """
    named = [value for name, value in vars(module).items() if name not in ("_parameters", "_modules")]
    return [(table, dict(table)) for table in named if isinstance(table, dict)]
