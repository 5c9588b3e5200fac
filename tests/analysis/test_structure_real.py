"""Residual streams, attention and linear sites of transformers of every norm placement, from two exporters."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from tiny_transformers import exported

from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.branches import long_skips
from graphopt.analysis.linear_sites import linear_sites, roles
from graphopt.analysis.residual import residual_streams
from graphopt.analysis.shapes import infer
from graphopt.graph import load
from graphopt.models.catalogue import fetch
from graphopt.pass_manager import PassManager
from graphopt.recipe import load as load_recipe


def canonical(path) -> ir.Model:
    model = load(path)
    PassManager(load_recipe().passes(), verify="none")(model)
    return model


BIASED = {"q": 3, "k": 3, "v": 3, "o": 3, "fc1": 3, "fc2": 3}
GATED = {"q": 3, "k": 3, "v": 3, "o": 3, "gate": 3, "up": 3, "down": 3, "embed": 1, "head": 1}
EXPECTED = {
    "gpt2": ("pre", {"attention": 3, "mlp": 3}, {"qkv": 3, "o": 3, "fc1": 3, "fc2": 3, "embed": 2, "head": 1}),
    "opt": ("pre", {"attention": 3, "mlp": 3}, {**BIASED, "embed": 2, "head": 1}),
    "llama": ("pre", {"attention": 3, "mlp": 3}, GATED),
    "gemma2": ("sandwich", {"attention": 3, "mlp": 3}, GATED),
    "neox": ("pre", {"attention+mlp": 3}, {"qkv": 3, "o": 3, "fc1": 3, "fc2": 3, "embed": 1, "head": 1}),
    "bert": ("post", {"attention": 3, "mlp": 3}, {**BIASED, "embed": 3}),
    "vit": ("pre", {"attention": 3, "mlp": 3}, {**BIASED, "head": 1}),
}


@pytest.mark.export
@pytest.mark.parametrize("name", EXPECTED)
def test_transformers(name: str) -> None:
    placement, branches, expected = EXPECTED[name]
    model = canonical(exported(name, "torchscript"))
    facts = infer(model, believe_names=True)
    (stream,) = residual_streams(model, facts)
    data = stream.to_dict()
    assert (data["placement"], data["branches"]) == (placement, branches)
    assert (data["layers"], data["features"]) == (3, 32)
    attention = attention_sites(model, facts)
    assert [(a.heads, a.head_size) for a in attention] == [(4, 8)] * 3
    sites = linear_sites(model, attention)
    assert roles(sites) == expected
    readers = data["readers"]
    if placement in ("pre", "sandwich"):
        # Once their gains are folded, the two norms of GPT-NeoX's parallel branches are one.
        assert readers == {"norm": 4 if name == "neox" else 7}
    groups: dict[int, list[str]] = {}
    for site in sites:
        groups.setdefault(site.group, []).append(site.role)
    assert groups[next(s.group for s in sites if s.role in ("q", "qkv"))] in (
        ["q", "k", "v"],
        ["qkv", "fc1"] if name == "neox" else ["qkv"],
    )
    if "gate" in expected:
        assert ["gate", "up"] in [sorted(g) for g in groups.values()]


@pytest.mark.export
@pytest.mark.parametrize("name", ["gpt2", "whisper"])
def test_the_other_exporter(name: str) -> None:
    model = canonical(exported(name, "dynamo"))
    facts = infer(model, believe_names=True)
    streams = residual_streams(model, facts)
    if name == "gpt2":
        assert [s.to_dict()["branches"] for s in streams] == [{"attention": 3, "mlp": 3}]
        return
    # Encoder and decoder; a decoder layer attends twice.
    assert [s.to_dict()["branches"] for s in streams] == [{"attention": 3, "mlp": 3}, {"attention": 4, "mlp": 2}]
    assert [len(s.layers) for s in streams] == [3, 2]
    assert roles(linear_sites(model, attention_sites(model, facts))) == {
        "q": 7, "k": 7, "v": 7, "o": 7, "fc1": 5, "fc2": 5, "embed": 1, "head": 1,
    }  # fmt: skip


@pytest.mark.export
def test_resnet() -> None:
    model = canonical(exported("resnet", "torchscript"))
    (stream,) = residual_streams(model, infer(model, believe_names=True))
    data = stream.to_dict()
    assert (data["branches"], data["placement"], data["shortcuts"], data["layers"]) == ({"conv": 4}, "none", 2, 4)


def unet():
    """Two levels of residual blocks with GroupNorm and SiLU, the way down concatenated to the way up."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.n1, self.n2 = nn.GroupNorm(2, inputs), nn.GroupNorm(2, outputs)
            self.c1, self.c2 = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
            self.short = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.c2(torch.nn.functional.silu(self.n2(self.c1(torch.nn.functional.silu(self.n1(x))))))
            return self.short(x) + y

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3, padding=1)
            self.down1, self.down2 = Block(8, 8), Block(8, 16)
            self.smaller = nn.Conv2d(8, 8, 3, stride=2, padding=1)
            self.middle = Block(16, 16)
            self.larger = nn.ConvTranspose2d(16, 8, 2, stride=2)
            self.up = Block(16, 8)
            self.last = nn.Conv2d(8, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first = self.down1(self.first(x))
            low = self.middle(self.down2(self.smaller(first)))
            return self.last(self.up(torch.cat([first, self.larger(low)], 1)))

    return UNet().eval(), (torch.randn(1, 3, 16, 16),)


@pytest.mark.export
@pytest.mark.parametrize("dynamo", [True, False])
def test_unet(dynamo: bool, tmp_path) -> None:
    import torch

    module, inputs = unet()
    torch.onnx.export(module, inputs, tmp_path / "unet.onnx", dynamo=dynamo, opset_version=18)
    model = canonical(tmp_path / "unet.onnx")
    streams = residual_streams(model, infer(model, believe_names=True))
    assert sum(len(s.branches) for s in streams) == 4
    assert {b.kind for s in streams for b in s.branches} == {"conv"}
    assert sum(bool(b.shortcut) for s in streams for b in s.branches) == 2
    # Shortcuts change the number of channels, so a block that has one may continue the stream before it.
    assert len(streams) in (3, 4)
    (skip,) = long_skips(model)
    assert skip.length > 20


@pytest.mark.real
@pytest.mark.parametrize(
    ("key", "branches"),
    [
        ("open-nsfw", {"conv": 16}),
        ("paraphrase-minilm", {"attention": 3, "mlp": 3}),
        ("smart-turn", {"attention": 4, "mlp": 4}),
    ],
)
def test_real_models(key: str, branches: dict[str, int]) -> None:
    model = canonical(fetch(key))
    streams = residual_streams(model, infer(model, believe_names=True))
    assert streams[0].to_dict()["branches"] == branches
