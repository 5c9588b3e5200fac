"""Runs every model of a folder, with the library and without it; needs nothing but onnxruntime and numpy.

python run_models.py FOLDER LIBRARY

Prints onnxruntime's version, and for each model the operators that ran with the library.
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
        feeds = dict(np.load(path.with_suffix(".npz")))
        for kernel in (True, False):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 4
            if kernel:
                options.register_custom_ops_library(library)
                options.enable_profiling = True
                options.profile_file_prefix = str(path.with_suffix(".profile"))
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            outputs = session.run(None, feeds)
            np.savez(path.with_suffix(f".{'kernel' if kernel else 'body'}.npz"), *outputs)
            if kernel:
                events = json.loads(Path(session.end_profiling()).read_text())
                print(path.stem, *sorted({e["args"]["op_name"] for e in events if "op_name" in e.get("args", {})}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
