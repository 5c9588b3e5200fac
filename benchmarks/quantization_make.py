"""Run one recipe and say what it took: a process of its own beside `quantization.py`, for its time and peak memory.

    python benchmarks/quantization_make.py request.json

The request: `source`, `target`, `recipe` (parsed YAML), `assume`, `data` (null, tokens or arrays). The last line of the
output is JSON: `seconds`, `peak` (bytes of resident memory at most), `left` (reasons, each with its number).
"""

from __future__ import annotations

import collections
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

import graphopt
from graphopt.calibration.data import BatchedDataset, Dataset
from graphopt.calibration.text import TextDataset
from graphopt.errors import GraphoptError
from graphopt.recipe import load


def main() -> int:
    """Read the request, run, print."""
    request = json.loads(Path(sys.argv[1]).read_text())
    begin = time.perf_counter()
    try:
        result = optimized(request)
    except GraphoptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    reasons = collections.Counter(site.detail for name, site in result.report.run.left() if "quant" in name)
    print(
        json.dumps(
            {
                "seconds": time.perf_counter() - begin,
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "left": dict(reasons.most_common(8)),
            }
        )
    )
    return 0


def optimized(request: dict[str, Any]) -> Any:
    """The result, written."""
    recipe = load(request["recipe"])
    needed = any(getattr(p, "needs", ()) for p in recipe.passes())
    result = graphopt.optimize(
        request["source"],
        recipe,
        assume=request["assume"],
        verify="none",
        calibration=data_set(request["data"]) if needed and request["data"] else None,
    )
    result.save(request["target"], external_data=True)
    return result


def data_set(data: dict[str, Any]) -> Dataset:
    """Windows of text or batches of arrays."""
    if "tokens" in data:
        return TextDataset(np.load(data["tokens"]), data["window"], limit=data["samples"])
    with np.load(data["arrays"]) as arrays:
        return BatchedDataset({name: arrays[name] for name in arrays.files}, data["batch"])


if __name__ == "__main__":
    sys.exit(main())
