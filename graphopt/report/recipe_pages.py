"""One Markdown page for each recipe that ships, made from its file: what `docs/recipes/` holds, and its contents.

The comment that a recipe's file opens with is the page's text. Measured rows are those that carry the recipe's name in
the tables of the pages of measurements.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import yaml

from graphopt.passes import registry
from graphopt.recipe import described, load, shipped
from graphopt.report.markdown import cell, table

FOLDER = "graphopt/models/recipes"
MEASUREMENTS = ("quantization.md", "quantize-kv.md", "kv.md")
"""Pages with tables whose first column names recipes."""

FAMILIES = {
    "Exact, and parts of recipes": ("exact", "clean", "canonical", "lower", "fold-norms", "rotate", "decode"),
    "Weights in few bits, without data": (
        "rtn", "finequant", "adadim", "nf4", "nupes", "bitmod", "higgs", "easyquant", "lorc",
    ),
    "Weights in few bits, by data": ("auto", "gptq", "gptq2", "comq", "rsq", "awq", "eora"),
    "Weights and activations in integers": ("int8-dynamic", "llm-int8", "int8-static", "w4a8", "w4a4", "smooth-quant"),
    "The key/value cache of a decoder": (
        "kv8", "kv4", "share-kv", "share-equal-kv", "low-rank-kv", "predict-kv", "couple-kv", "evictable-kv",
    ),
    "Fewer layers": ("depth", "truncate", "parallel", "reuse"),
}  # fmt: skip
"""Recipes by heading; one that stands nowhere comes last, under a heading of its own."""

_MARK = "<!-- Generated from {source} by `make docs`: change the text there, not this page. -->"
_BY_MODEL = ("int8-dynamic", "int8-static", "llm-int8", "w4a8", "w4a4", "smooth-quant")
"""Recipes that encoders and vision models are measured with."""
_ROWS = {"rotate": "rotate+gptq"}
"""Recipes that are measured in front of another."""


@dataclasses.dataclass(frozen=True)
class MeasuredTable:
    """A table of a page of measurements.

    Attributes:
        about: What stands above all tables of its part: the model, the data, the date.
        caption: What stands right above it.
        head: The cells of its heading.
        rows: Those of its rows, in Markdown.
    """

    about: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def pages(docs: Path) -> dict[str, str]:
    """The page of each recipe by file name.

    Args:
        docs: The folder of the documentation, with the pages of `MEASUREMENTS`; rows of one that is missing aren't
            shown.
    """
    measured = {
        name: tuple(measured_tables((docs / name).read_text(encoding="utf-8")))
        for name in MEASUREMENTS
        if (docs / name).is_file()
    }
    return {f"{name}.md": page(name, text, measured) for name, text in shipped().items()}


def contents() -> dict[str, str]:
    """The page that lists the recipes."""
    known = shipped()
    rest = tuple(name for name in known if not any(name in names for names in FAMILIES.values()))
    parts = [_MARK.format(source=f"{FOLDER}/"), "# Recipes"]
    parts.append(
        "`graphopt optimize model.onnx --recipe NAME` runs one; names joined by `+` run together, and `--set`\n"
        "changes an option ([user guide](user-guide.md#recipes)). What they cost and save is\n"
        "[measured](quantization.md)."
    )
    for heading, names in {**FAMILIES, "Others": rest}.items():
        rows = [[f"[{n}](recipes/{n}.md)", cell(load(n).description)] for n in names if n in known]
        if rows:
            parts += [f"## {heading}", table(["recipe", "what it does"], rows)]
    return {"recipes.md": "\n\n".join(parts) + "\n"}


def page(name: str, text: str, measured: dict[str, tuple[MeasuredTable, ...]]) -> str:
    """The page of one recipe.

    Args:
        name: Its name.
        text: Its file.
        measured: The tables of each page of measurements, by the page's file name.
    """
    description, sections = described(text)
    parts = [_MARK.format(source=f"{FOLDER}/{name}.yaml"), f"# {name}", f"**{description}**"]
    parts.append(sections)
    if not re.search(r"^## Measured$", sections, re.MULTILINE):
        parts += ["## Measured", _measured(name, measured)]
    parts += ["## Passes", _passes(text)]
    return "\n\n".join(part for part in parts if part) + "\n"


_CAPTION = re.compile(r"\*\*([^*]+)\*\*( \(.*\))?")
"""A line that a table is about, and what counts there."""


def measured_tables(text: str) -> Iterator[MeasuredTable]:
    """The tables of a page, in their order."""
    about = caption = ""
    rows: list[tuple[str, ...]] = []
    inside_code = False
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(tuple(part.strip() for part in re.split(r"(?<!\\)\|", line.strip().strip("|"))))
            continue
        if len(rows) > 2:
            yield MeasuredTable(about, caption, rows[0], tuple(rows[2:]))
            about = about if caption else ""
        rows = []
        if line.startswith(("#", "```", "<!--")):
            inside_code ^= line.startswith("```")
            about = caption = ""
        elif (found := _CAPTION.fullmatch(line)) is not None:
            caption = found[1]
        elif line and not caption and not inside_code and not line.startswith(("!", "- ")):
            about = f"{about} {line}".strip()


def _measured(name: str, pages_: dict[str, tuple[MeasuredTable, ...]]) -> str:
    """The rows that carry the recipe's name, each table's with what it is about; or how to measure them."""
    parts: list[str] = []
    for file, tables in pages_.items():
        found = [(one, rows) for one in tables if (rows := _rows_of(name, one))]
        if not found:
            continue
        for head in dict.fromkeys(one.head for one, _ in found):
            inside = [(one.caption, row) for one, rows in found if one.head == head for row in rows]
            about = dict.fromkeys(one.about for one, _ in found if one.head == head)
            parts += [text for text in about if text and text not in parts]
            if any(caption for caption, _ in inside):
                parts.append(table(["setting", *head], [[caption, *row] for caption, row in inside]))
            else:
                parts.append(table(head, [row for _, row in inside]))
        parts.append(f"From [{file.removesuffix('.md')}](../{file}), where the others stand beside it.")
    if parts:
        return "\n\n".join(parts)
    if name == "share-kv":
        command = "python benchmarks/kv.py --page docs/kv.md"
    elif any(name in names for heading, names in FAMILIES.items() if "cache" in heading):
        command = "python benchmarks/quantize_kv.py --page docs/quantize-kv.md"
    else:
        part = "--parts models" if name in _BY_MODEL else f"--only {_ROWS.get(name, name)}"
        command = f"python benchmarks/quantization.py --resume {part} --page docs/quantization.md"
    return f"Not measured yet. This does it, and `make docs` puts the rows here:\n\n```sh\n{command}\n```"


def _rows_of(name: str, one: MeasuredTable) -> list[tuple[str, ...]]:
    return [row for row in one.rows if name in re.split(r"[+ ,]", row[0])]


def _passes(text: str) -> str:
    """The recipe without its comment, and links to the pages of what stands in it beside the passes of `exact`."""
    data = yaml.safe_load(text)
    body = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    common = {step.name for step in load("exact").steps}
    links: list[str] = []
    for item in data["passes"]:
        key = item if isinstance(item, str) else next(iter(item))
        if key == "recipe":
            links.append(f"[{item['recipe']}]({item['recipe']}.md)")
        elif key in registry.builtin() and key not in common:
            links.append(f"[{key}](../passes/{key}.md)")
    linked = f"\n\nPages: {', '.join(dict.fromkeys(links))}." if links else ""
    return f"```yaml\n{body.strip()}\n```{linked}"
