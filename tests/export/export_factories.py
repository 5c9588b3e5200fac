"""Callables that tests export as `export_factories:name`."""

from __future__ import annotations

import torch
from torch import nn


def cnn():
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    return module, (torch.randn(1, 1, 28, 28),), ["image"], ["logits"]


def fully_convolutional():
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.SiLU(), nn.Upsample(scale_factor=2))
    axes = {"image": {0: "batch", 2: "height", 3: "width"}}
    return module, torch.randn(1, 3, 32, 32), ["image"], ["map"], axes


def bad_axes():
    return nn.ReLU(), torch.randn(1, 3), ["image"], ["map"], {"map": {0: "batch"}, "picture": {0: "batch"}}


class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 7, stride=7)
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.positions = nn.Parameter(torch.randn(1, 17, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 10)

    def forward(self, image):
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        return self.head(self.encoder(x)[:, 0])


def vit():
    return ViT(), (torch.randn(2, 1, 28, 28),)


class Positions(nn.Module):
    """Takes at most 12 tokens, so that the probes can't double the example's."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 8)
        self.positions = nn.Parameter(torch.randn(12, 8))

    def forward(self, ids, scale):
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        return {"hidden": x * scale, "mean": x.mean(1)}


def positions():
    axes = {"ids": {0: "batch", 1: "sequence"}}
    return (
        Positions(),
        {"ids": torch.randint(0, 50, (2, 12)), "scale": torch.tensor(2.0)},
        None,
        ["hidden", "mean"],
        axes,
    )


class DependsOnBatch(nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] == 2 else x * 3


def depends_on_batch():
    return DependsOnBatch(), (torch.randn(2, 4),)


class IgnoresOne(nn.Module):
    def forward(self, x, y):
        return x + 1


def ignores_one():
    return IgnoresOne(), (torch.randn(2, 4), torch.randn(2, 4))


def bfloat16():
    return nn.Linear(4, 4).bfloat16(), (torch.randn(2, 4).bfloat16(),)


def not_a_module():
    return "module", None


def fails():
    raise RuntimeError("no weights here\nsecond line")


def bad_names():
    return nn.ReLU(), (torch.randn(2, 4),), ["a", "b"]


value = 3
