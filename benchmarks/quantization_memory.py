"""Third part of `quantization.py`: memory and time of quantizing a large model, beside ONNX Runtime's native packer."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from quantization_models import save_feeds
from quantization_peers import ORT_RTN
from quantization_variants import Setting, make, recipe_of, run, size

from graphopt.errors import GraphoptError

BYTES, HIDDEN = 2.7e9, 1024
SETTING = Setting(4, 32)
LIMITS = {"rtn": "600 MB", "gptq": "1.5 GB"}
SAMPLES, TOKENS = 4, 128


def measure(options: argparse.Namespace) -> list[str]:
    """Measure what is missing; returns the lines of the table."""
    kept = options.work / "memory.json"
    rows: dict[str, Any] = json.loads(kept.read_text()) if options.resume and kept.exists() else {}
    folder = options.work / "large"
    source = folder / "model.onnx"
    if not source.exists():
        script = Path(__file__).with_name("make_large_model.py")
        subprocess.run(
            [
                sys.executable,
                str(script),
                "--bytes",
                str(options.large),
                "--hidden",
                str(HIDDEN),
                "--output",
                str(source),
            ],
            check=True,
        )
    for name in (*LIMITS, ORT_RTN):
        if name in rows:
            continue
        target = folder / name.replace(" ", "-") / "model.onnx"
        try:
            if name == ORT_RTN:
                target.parent.mkdir(parents=True, exist_ok=True)
                peer = str(Path(__file__).with_name("quantization_peers.py"))
                command = [sys.executable, peer, name, str(source), str(target), str(SETTING.group)]
                found = run(command, options.threads)
            else:
                found = make(source, target, recipe_of(name, SETTING), data=data(folder), threads=options.threads)
            rows[name] = {"seconds": found["seconds"], "peak": found["peak"], "bytes": size(target)}
        except GraphoptError as error:
            rows[name] = {"missing": str(error)}
        print(f"{name} on {size(source) / 1e9:.2f} GB: {rows[name]}", flush=True)
        for file in target.parent.glob("model.onnx*"):
            file.unlink()
        kept.write_text(json.dumps(rows, indent=1))
    text = [
        f"A transformer of {size(source) / 1e9:.1f} GB with random weights, {SETTING}, {options.threads} threads. "
        "Memory is what the process held itself, without pages of mapped files. "
        f"GPTQ saw {SAMPLES} samples of {TOKENS} vectors.",
        "",
        "| system | seconds | peak memory, MB | counts | result, MB |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        if "missing" in row:
            text.append(f"| {name} | left out: {row['missing']} | | | |")
            continue
        limit = f"under {LIMITS[name]}" if name in LIMITS else ""
        text.append(f"| {name} | {row['seconds']:.0f} | {row['peak'] / 1e6:.0f} | {limit} | {row['bytes'] / 1e6:.0f} |")
    return text


def data(folder: Path) -> dict[str, Any]:
    """Vectors to calibrate on, of numbers such as a norm gives."""
    rng = np.random.default_rng(0)
    feeds = [{"hidden_in": rng.normal(size=(1, TOKENS, HIDDEN)).astype(np.float32)} for _ in range(SAMPLES)]
    return {"feeds": str(save_feeds(feeds, folder / "calibration"))}
