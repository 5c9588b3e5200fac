"""Training of the classifiers that `graphopt.models.fashion` gives, with PyTorch, and their export.

AdamW with one cycle of the learning rate over a few epochs; pictures are mirrored and shifted by up to two pixels at
random. Everything random follows one seed.
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import UsageError
from graphopt.models.packages import Notify

if TYPE_CHECKING:
    from graphopt.models.fashion import Kind

MEAN, DEVIATION = 0.2860, 0.3530
"""Of the pixels of the training pictures; the models subtract and divide themselves."""
SHIFT = 2
"""Pixels by which pictures are moved at most."""
OPSET = 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a classifier is trained.

    Attributes:
        epochs: Times that every picture is seen.
        rate: The highest learning rate.
        layers: Layers of a ViT.
        batch: Pictures in one step.
    """

    epochs: int
    rate: float
    layers: int = 0
    batch: int = 128


PLANS: dict[str, Plan] = {
    "cnn": Plan(epochs=4, rate=4e-3),
    "vit": Plan(epochs=10, rate=2e-3, layers=4),
    "vit-deep": Plan(epochs=10, rate=1.5e-3, layers=12),
}


def train(
    kind: Kind,
    pixels: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
    path: Path,
    *,
    plan: Plan | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Notify | None = None,
) -> None:
    """Train a classifier and write it as ONNX (opset 20, any batch).

    Args:
        kind: Which.
        pixels: The pictures [n, 1, 28, 28], from 0 to 1.
        labels: Their classes [n].
        path: The file to write.
        plan: How; None: that of `PLANS`.
        threads: Threads; None: as PyTorch chooses.
        seed: Of the weights, of the order of the pictures and of their changes.
        progress: Called with a line of text after each epoch.

    Raises:
        UsageError: PyTorch is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise UsageError("Training needs PyTorch; install graphopt[export].") from error
    chosen = plan or PLANS[kind]
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = _cnn() if kind == "cnn" else _vit(chosen.layers)
            _fit(network, torch.from_numpy(pixels), torch.from_numpy(labels), chosen, kind, progress)
            _write(network.eval(), path)
    finally:
        torch.set_num_threads(before)


def _fit(network: Any, pixels: Any, labels: Any, plan: Plan, kind: str, progress: Notify | None) -> None:
    import torch

    steps = max(1, len(labels) // plan.batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=plan.rate, weight_decay=0.02)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, plan.rate, total_steps=plan.epochs * steps)
    network.train()
    for epoch in range(plan.epochs):
        order = torch.randperm(len(labels))
        total = 0.0
        for step in range(steps):
            chosen = order[step * plan.batch : (step + 1) * plan.batch]
            loss = torch.nn.functional.cross_entropy(network(_changed(pixels[chosen])), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            rates.step()
            total += float(loss.detach())
        if progress is not None:
            progress(f"{kind}: epoch {epoch + 1} of {plan.epochs}, loss {total / steps:.3f}")


def _changed(pixels: Any) -> Any:
    """The batch moved by some pixels, and each picture mirrored or not."""
    import torch

    flipped = torch.where(torch.rand(len(pixels), 1, 1, 1) < 0.5, pixels.flip(3), pixels)
    down, right = (int(n) for n in torch.randint(0, 2 * SHIFT + 1, (2,)))
    height, width = pixels.shape[2:]
    return torch.nn.functional.pad(flipped, (SHIFT,) * 4)[:, :, down : down + height, right : right + width]


def _normalized() -> Any:
    """The layer that pictures go through first."""
    import torch

    class Normalized(torch.nn.Module):  # type: ignore[misc]
        def forward(self, image: Any) -> Any:
            return (image - MEAN) / DEVIATION

    return Normalized()


def _cnn() -> Any:
    """A residual CNN: 16, 32 and 64 channels, 28, 14 and 7 pixels, BatchNormalization and ReLU."""
    import torch

    nn = torch.nn

    def unit(inputs: int, outputs: int, stride: int = 1) -> Any:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())

    class Residual(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.first = unit(channels, channels)
            self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
            self.norm = nn.BatchNorm2d(channels)

        def forward(self, x: Any) -> Any:
            return torch.relu(x + self.norm(self.second(self.first(x))))

    layers = [_normalized(), unit(1, 16), unit(16, 32, 2), Residual(32), unit(32, 64, 2), Residual(64)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def _vit(depth: int, width: int = 64, heads: int = 4, patch: int = 7) -> Any:
    """A pre-norm ViT with GELU over patches of 7 × 7 pixels, whose mean is classified."""
    import torch

    nn = torch.nn
    tokens = (28 // patch) ** 2

    class Attention(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

        def forward(self, x: Any) -> Any:
            q, k, v = (f(x).unflatten(2, (heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.o(mixed.transpose(1, 2).flatten(2))

    class Layer(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.first, self.second = Attention(), nn.LayerNorm(width), nn.LayerNorm(width)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.first(x))
            return x + self.mlp(self.second(x))

    class ViT(nn.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.image = _normalized()
            self.patches = nn.Conv2d(1, width, patch, patch)
            self.positions = nn.Parameter(torch.randn(1, tokens, width) * 0.02)
            self.layers = nn.Sequential(*(Layer() for _ in range(depth)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

        def forward(self, image: Any) -> Any:
            x = self.patches(self.image(image)).flatten(2).transpose(1, 2) + self.positions
            return self.head(self.norm(self.layers(x)).mean(1))

    return ViT()


def _write(network: Any, path: Path) -> None:
    import torch

    told = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                network, (torch.zeros(2, 1, 28, 28),), path, dynamo=True, opset_version=OPSET, external_data=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},), input_names=["image"], output_names=["logits"],
                verbose=False,
            )  # fmt: skip
    finally:
        logging.getLogger("torch.onnx").setLevel(told)
