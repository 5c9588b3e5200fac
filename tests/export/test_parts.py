"""Parts of a module under the names of the whole."""

from __future__ import annotations

from typing import Any

import pytest

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")

from graphopt.export.parts import only, path_of, without  # noqa: E402


def whole() -> Any:
    linear = torch.nn.Linear
    model = torch.nn.ModuleDict({"encoder": linear(2, 3), "decoder": torch.nn.Sequential(linear(3, 3), linear(3, 2))})
    module = torch.nn.Module()
    module.model, module.head = model, linear(2, 5)
    module.scale = torch.nn.Parameter(torch.ones(1))
    module.register_buffer("table", torch.zeros(4))
    return module


def names(module: Any) -> set[str]:
    return {name for name, _ in [*module.named_parameters(), *module.named_buffers()]}


def test_only() -> None:
    module = whole()
    part = only(module, module.model["decoder"][1])
    assert names(part) == {"model.decoder.1.weight", "model.decoder.1.bias"}
    assert dict(part.named_parameters())["model.decoder.1.bias"] is module.model["decoder"][1].bias
    assert only(module, module) is module


def test_without() -> None:
    module = whole()
    gone = {"model.encoder.weight", "model.encoder.bias", "model.decoder.0.weight", "model.decoder.0.bias"}
    part = without(module, module.model["encoder"], module.model["decoder"][0])
    assert names(part) == names(module) - gone
    assert part.head is module.head
    assert not part.training
    assert without(module, module) is module
    assert without(module) is module
    assert "encoder" in module.model


def test_no_part() -> None:
    with pytest.raises(ValueError, match="Identity is no part of Module"):
        path_of(whole(), torch.nn.Identity())
