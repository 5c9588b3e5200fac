"""The models of the zoo: every ONNX file of `graphopt.models`, MiniLM in four exports, and SmolLM2."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

from graphopt.models.catalogue import MODELS, fetch

_MINILM = {
    f"minilm-{exporter}-{attention}": (flag, attention)
    for exporter, flag in (("torch-export", "dynamo"), ("torchscript", "torchscript"))
    for attention in ("sdpa", "eager")
}
_MINILM_SHAPES = ((1, 16), (1, 128), (8, 64))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One model of the zoo.

    Attributes:
        key: Its name.
        use: What it is.
        workloads: What it is timed on: sizes of its dynamic dimensions by name, with a label; empty sizes: usual ones.
        file: Its file, where it is none of the catalogue's.
    """

    key: str
    use: str
    workloads: dict[str, dict[str, int]]
    file: Path | None = None

    def path(self, folder: Path) -> Path:
        """The model's file: fetched, or exported into `folder` unless it lies there already."""
        if self.file is not None:
            return self.file
        if self.key == "smollm2":
            target = folder / self.key / "model.onnx"
            if not target.exists():
                script = Path(__file__).with_name("export_smollm2.py")
                subprocess.run(
                    [sys.executable, str(script), "--output", str(target)], check=True, stdout=subprocess.DEVNULL
                )
            return target
        if self.key not in _MINILM:
            return fetch(self.key)
        target = folder / f"{self.key}.onnx"
        if not target.exists():
            exporter, attention = _MINILM[self.key]
            # In a process of its own: torch would stay in memory beside everything that follows.
            command = (
                "export",
                str(fetch("minilm")),
                "-o",
                str(target),
                "--exporter",
                exporter,
                "--attention",
                attention,
                # What PyTorch writes by itself.
                "--raw",
                "--every-layer",
                "--opset",
                "21" if exporter == "dynamo" else "17",
            )
            subprocess.run([sys.executable, "-m", "graphopt", *command], check=True, stdout=subprocess.DEVNULL)
        return target


ENTRIES = {
    key: Entry(
        key,
        f"all-MiniLM-L6-v2 written by {exporter}, {attention} attention",
        {f"{batch}×{sequence}": {"batch": batch, "sequence": sequence} for batch, sequence in _MINILM_SHAPES},
    )
    for key, (exporter, attention) in _MINILM.items()
}
ENTRIES["smollm2"] = Entry(
    "smollm2",
    "SmolLM2-135M with its cache, written by torch.export, opset 21: 128 tokens, then one token after 256",
    {"1×128": {"batch": 1, "sequence": 128, "past": 0}, "1×1 after 256": {"batch": 1, "sequence": 1, "past": 256}},
)
ENTRIES |= {key: Entry(key, model.use, {"": {}}) for key, model in MODELS.items() if model.kind == "onnx"}
