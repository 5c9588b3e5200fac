"""Runs every model of a folder, with the library and without it; needs nothing but onnxruntime and numpy.

python run_models.py FOLDER LIBRARY

Prints onnxruntime's version, and for each model with the library ("kernel") and without it ("body") what operators ran,
or why it failed.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def main(folder: Path, library: str) -> None:
    print(onnxruntime.__version__)
    for path in sorted(folder.glob("*.onnx")):
        for way in ("kernel", "body"):
            try:
                print(path.stem, way, *run(path, library if way == "kernel" else None, path.with_suffix(f".{way}.npz")))
            except Exception as error:
                print(path.stem, way, "FAILED:", str(error).replace("\n", " "))


def run(path: Path, library: str | None, results: Path) -> list[str]:
    """Run one model, write what comes out, and return the operators that ran."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.enable_profiling = True
    options.profile_file_prefix = str(results.with_suffix(""))
    if library is not None:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    np.savez(results, *session.run(None, dict(np.load(path.with_suffix(".npz")))))
    events = json.loads(Path(session.end_profiling()).read_text())
    return sorted({event["args"]["op_name"] for event in events if "op_name" in event.get("args", {})})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
