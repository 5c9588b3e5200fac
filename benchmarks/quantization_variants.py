"""The rows of `quantization.py`: recipes, bits, groups, and how their files are made, each in a process of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from export_large import measure

import graphopt
from graphopt.api import describe_source
from graphopt.errors import GraphoptError, UsageError
from graphopt.passes import registry
from graphopt.recipe import Recipe, Step, load

Kind = Literal["float", "data-free", "calibrated", "automatic", "peer"]
ASSUMED = ("no-left-padding", "no-batched-chunks", "counted-positions", "max-length=8192")
FLOAT = "float32"


@dataclasses.dataclass(frozen=True)
class Setting:
    """Bits of a weight, and how many share a scale."""

    bits: int
    group: int

    def __str__(self) -> str:
        return f"{self.bits} bits, group {self.group}"


SETTINGS = (Setting(4, 32), Setting(4, 128), Setting(3, 32), Setting(2, 32))
BUDGETS = dict(zip(SETTINGS, ("93MB", "86.8MB", "81.5MB", "65MB"), strict=True))
"""What the weights take where all but the embedding have the same bits and groups, by GPTQ; of 2 bits, by `gptq2`."""
ACTIVATIONS = "8-bit weights and activations"
"""Where recipes stand that round activations too."""


@dataclasses.dataclass(frozen=True)
class Method:
    """A recipe.

    Attributes:
        recipe: Its name.
        kind: Whether it looks at data.
        bits: Those it is run at; (): once, as it ships.
    """

    recipe: str
    kind: Kind
    bits: tuple[int, ...]


METHODS = (
    Method("rtn", "data-free", (4, 3, 2)),
    Method("finequant", "data-free", (4, 3, 2)),
    Method("easyquant", "data-free", (4, 3, 2)),
    Method("adadim", "data-free", (4, 3, 2)),
    Method("nf4", "data-free", (4,)),
    Method("nupes", "data-free", (4, 3)),
    Method("bitmod", "data-free", (4, 3)),
    Method("higgs", "data-free", (4, 3, 2)),
    Method("awq", "calibrated", (4, 3, 2)),
    Method("gptq", "calibrated", (4, 3, 2)),
    Method("gptq+decode", "calibrated", (4,)),
    Method("gptq2", "calibrated", (2,)),
    Method("rsq", "calibrated", (4, 3, 2)),
    Method("comq", "calibrated", (4, 3, 2)),
    Method("rotate+gptq", "calibrated", (4, 3, 2)),
    Method("eora", "calibrated", (4, 3, 2)),
    Method("lorc", "data-free", (4, 3, 2)),
    Method("auto", "automatic", (4, 3, 2)),
    Method("int8-dynamic", "data-free", ()),
    Method("int8-static", "calibrated", ()),
    Method("llm-int8", "calibrated", ()),
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """One row.

    Attributes:
        method: The recipe's name, or the peer's.
        kind: Of the method.
        setting: None: as the recipe ships.
    """

    method: str
    kind: Kind
    setting: Setting | None = None

    @property
    def name(self) -> str:
        """The row's name, by which results are kept."""
        return self.method if self.setting is None else f"{self.method}, {self.setting}"

    @property
    def section(self) -> str:
        """The heading that the row stands under."""
        return ACTIVATIONS if self.setting is None else str(self.setting)


def variants(only: Sequence[str]) -> list[Variant]:
    """The rows of graphopt's recipes.

    Args:
        only: Names of methods or of rows; empty: all.
    """
    found = []
    for method in METHODS:
        settings = [s for s in SETTINGS if s.bits in method.bits] if method.bits else [None]
        found += [Variant(method.recipe, method.kind, setting) for setting in settings]
    return [v for v in found if not only or v.method in only or v.name in only]


def recipe_of(method: str, setting: Setting | None = None, options: dict[str, Any] | None = None) -> Recipe:
    """The recipe called `method` with these bits and groups wherever a pass has such options.

    Args:
        method: The recipe's name.
        setting: None: as it ships.
        options: More options, for every pass that has them.

    Raises:
        UsageError: It doesn't ship, or none of its passes has bits.
    """
    recipe = load(method)
    widths = {} if setting is None else {"bits": setting.bits, "group_size": setting.group}
    steps, met = [], set[str]()
    for step in recipe.steps:
        cls = registry.find(step.name)
        known = getattr(cls, "options", dict)()
        given = {**(widths if "bits" in known else {}), **(options or {})}
        fitting = {name: value for name, value in given.items() if name in known}
        met |= set(fitting)
        if setting is not None and "candidates" in known:  # a pass that chooses bits itself gets as many bytes in all
            fitting["budget"] = BUDGETS[setting]
            met |= set(widths)
        steps.append(Step(step.name, {**step.options, **fitting}))
    if missing := sorted({*widths, *(options or {})} - met):
        raise UsageError(f"No pass of the recipe {method} has the option {missing[0]!r}.")
    return dataclasses.replace(recipe, steps=tuple(steps))


def make(
    source: Path,
    target: Path,
    recipe: Recipe,
    *,
    assume: Sequence[str] = (),
    data: dict[str, Any] | None = None,
    threads: int = 2,
) -> dict[str, Any]:
    """Run a recipe in a process of its own; returns seconds, peak memory in bytes and what was left alone.

    Args:
        source: The model.
        target: The file to write.
        recipe: The recipe.
        assume: What it may take for granted.
        data: Calibration data for recipes that need it: {"tokens": file, "window": n, "samples": n} or
            {"feeds": folder of .npz files}.
        threads: Threads of the process.

    Raises:
        GraphoptError: It failed; the message is its last line.
    """
    request = {
        "source": str(source), "target": str(target), "recipe": recipe.to_data(), "assume": list(assume), "data": data,
    }  # fmt: skip
    target.parent.mkdir(parents=True, exist_ok=True)
    file = target.parent / "request.json"
    file.write_text(json.dumps(request))
    worker = Path(__file__).with_name("quantization_make.py")
    return run([sys.executable, str(worker), str(file)], threads)


def run(command: list[str], threads: int) -> dict[str, Any]:
    """Run a worker, whose last line is JSON, with so many threads; adds its `seconds` and the `peak` of its memory.

    The peak is of anonymous memory: pages of mapped files go whenever the system needs them.

    Raises:
        GraphoptError: It failed; the message is its last line.
    """
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, str(threads))}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as told:
        code, seconds, anonymous, _ = measure(command, env=environment, stdout=out, stderr=told)
        texts = []
        for stream in (out, told):
            stream.seek(0)
            texts.append([line.strip() for line in stream.read().splitlines() if line.strip()])
    if code or not texts[0]:
        raise GraphoptError((texts[1] or texts[0] or [f"exit status {code}"])[-1][:300])
    return {"left": {}, **json.loads(texts[0][-1]), "seconds": seconds, "peak": anonymous}


def size(file: Path) -> int:
    """Bytes of a model and its external data."""
    return int(describe_source(graphopt.load(file))["bytes"])
