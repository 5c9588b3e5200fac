"""Run one recipe in a process of its own beside `quantization.py`, which measures its time and peak memory.

    python benchmarks/quantization_make.py request.json

The request: `source`, `target`, `recipe` (parsed YAML), `assume`, `data` (null, tokens or feeds). The last line of the
output is JSON: `left`, reasons for what wasn't quantized, each with its number.
"""

from __future__ import annotations

import collections
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import graphopt
from graphopt.calibration.data import ArrayDataset, Dataset
from graphopt.calibration.text import TextDataset
from graphopt.errors import GraphoptError
from graphopt.recipe import load


def main() -> int:
    """Read the request, run, print."""
    request = json.loads(Path(sys.argv[1]).read_text())
    try:
        result = optimized(request)
    except GraphoptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if failed := result.report.run.rolled_back:
        print(f"{failed[0].name}: {failed[0].detail}", file=sys.stderr)
        return 1
    reasons = collections.Counter(site.detail for name, site in result.report.run.left() if "quant" in name)
    print(json.dumps({"left": dict(reasons.most_common(8))}))
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
    """Windows of text, or feeds."""
    if "tokens" in data:
        return TextDataset(np.load(data["tokens"]), data["window"], limit=data["samples"])
    files = sorted(Path(data["feeds"]).glob("*.npz"))
    return ArrayDataset([read_feeds(file) for file in files])


def read_feeds(file: Path) -> dict[str, Any]:
    """One file of `quantization_models.save_feeds`."""
    with np.load(file) as held:
        return {name.replace("|", "/"): held[name] for name in held.files}


if __name__ == "__main__":
    sys.exit(main())
