"""Operations of vision models that no trace holds, in forms that one does: for what runs inside `traceable()`."""

from __future__ import annotations

from typing import Any

from graphopt.export.dependencies import require


class Reached(Exception):
    """Carries a result out of the code that would go on to take it apart."""

    def __init__(self, result: Any) -> None:
        self.result = result


def traceable() -> Any:
    """A context in which torch functions do this instead of what they do.

    1. `x[mask]` with a mask of truth values gives `x`: of a batch of images none is left out as mere padding. How many
       rows a mask selects is a number that only a run knows. The context's `selected` says whether this was needed.
    2. `bucketize` counts the boundaries that lie before each number; ONNX has no operator for it.
    3. `conv3d` without a bias gets one of zeros: onnxscript 0.7 makes up one of the wrong shape.
    4. Any function raises `Reached` once something other than None was put into the context's `result`. So code is left
       behind a module, and not from inside of it, which an exporter that follows the calls of modules wouldn't survive.
    """
    torch = require("torch")
    from torch.overrides import TorchFunctionMode

    class Traceable(TorchFunctionMode):  # type: ignore[misc]
        selected = False
        result: Any = None

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if self.result is not None:
                raise Reached(self.result)
            if function is torch.Tensor.__getitem__ and _is_mask(args[1]):
                self.selected = True
                return args[0]
            if function is torch.bucketize:
                return _bucketize(*args, **kwargs)
            if function is torch.conv3d:
                return function(*_with_bias(*args, **kwargs))
            return function(*args, **kwargs)

    return Traceable()


def _is_mask(index: Any) -> bool:
    torch = require("torch")
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


def _bucketize(numbers: Any, boundaries: Any, *, right: bool = False, out_int32: bool = False) -> Any:
    torch = require("torch")
    numbers = numbers.unsqueeze(-1)
    before = boundaries <= numbers if right else boundaries < numbers
    return before.to(torch.int32 if out_int32 else torch.int64).sum(-1)


def _with_bias(images: Any, weight: Any, bias: Any = None, *more: Any, **named: Any) -> tuple[Any, ...]:
    """conv3d's arguments in order."""
    order = ("stride", "padding", "dilation", "groups")
    defaults = (1, 0, 1, 1)
    rest = [*more, *(named.get(name, value) for name, value in list(zip(order, defaults, strict=True))[len(more) :])]
    return (images, weight, weight.new_zeros(weight.shape[0]) if bias is None else bias, *rest)
