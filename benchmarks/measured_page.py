"""Tables of benchmarks in pages that people wrote."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import onnxruntime


def put_tables(page: Path, name: str, text: str) -> None:
    """Put what was measured into a page, between `<!-- name -->` and `<!-- end of name -->`.

    Raises:
        ValueError: The page lacks these marks.
    """
    before, begin, rest = page.read_text(encoding="utf-8").partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    if not end:
        raise ValueError(f"{page} has no place for '{name}': it needs <!-- {name} --> and <!-- end of {name} -->")
    page.write_text(f"{before}{begin}{text.rstrip()}\n{end}{after}", encoding="utf-8")


def processor() -> str:
    """The processor's name, or its architecture where the system doesn't tell."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), platform.machine())


def circumstances() -> str:
    """A line on when and where something was measured."""
    return f"Measured on {time.strftime('%Y-%m-%d')} with ONNX Runtime {onnxruntime.__version__}, {processor()}."
