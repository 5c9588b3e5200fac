"""Runs without numbers: shapes as with numbers, nothing left behind, and which inputs count."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")

from graphopt.export.dry_run import dry_run, used  # noqa: E402


class Remembers(torch.nn.Module):
    """Sets an attribute, a buffer and a hook on itself when it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)
        self.register_buffer("seen", torch.zeros(2))
        self.last = None

    def forward(self, x: Any) -> Any:
        self.last = self.seen = x
        self.linear.register_forward_hook(lambda *_: None)
        return self.linear(x)


def test_shapes_and_types_without_numbers() -> None:
    module = torch.nn.Linear(3, 4).half()
    made = dry_run(module, module, [torch.zeros(5, 3, dtype=torch.half)])
    assert (tuple(made.shape), made.dtype) == ((5, 4), torch.half)
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied|same reduction dim"):
        dry_run(module, module, [torch.zeros(5, 2, dtype=torch.half)])


def test_nothing_is_left_behind() -> None:
    module = Remembers()
    before = module.seen
    dry_run(module, module, [torch.zeros(2, 3)])
    assert module.last is None
    assert module.seen is before
    assert dict(module._buffers) == {"seen": before}
    assert not module.linear._forward_hooks


@pytest.mark.parametrize("question", [lambda x: x * 2 if x.any() else x, lambda x: x[x > 0]], ids=["if", "select"])
def test_code_that_asks_for_numbers(question: Callable[[Any], Any]) -> None:
    with pytest.raises(ValueError, match="its code decides by numbers in its inputs"):
        dry_run(torch.nn.Identity(), question, [torch.zeros(3)])


def in_place(x: Any, y: Any) -> Any:
    made = torch.zeros(4)
    made.view(2, 2)[0] = y[:2]
    return (made + x.shape[0],)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda x, y: (x + y,), [True, True]),
        (lambda x, y: (x * 2, y.shape[0]), [True, False]),
        (lambda x, y: (torch.ones_like(x), y), [False, True]),
        (lambda x, y: (y.new_zeros(x.shape) + y,), [False, True]),
        (lambda x, y: (x.view(-1)[1:].clone(),), [True, False]),
        (lambda x, y: (torch.where(y > 0, 1.0, 0.0),), [False, True]),
        (lambda x, y: ([x, y] and torch.zeros(1),), [False, False]),
        (in_place, [False, True]),
    ],
)
def test_which_inputs_count(call: Callable[..., Any], expected: list[bool]) -> None:
    def tensors_only(*given: Any) -> list[Any]:
        return [item for item in call(*given) if isinstance(item, torch.Tensor)]

    assert used(torch.nn.Identity(), tensors_only, [torch.ones(4), torch.ones(4)]) == expected
