"""One Markdown page for each pass, made from its source: what `docs/passes/` holds and `graphopt passes show` prints.

python -m graphopt.report.pages docs            write the pages of passes, operators and recipes
python -m graphopt.report.pages docs --check    say which are out of date (exit code 1)
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from graphopt.passes import registry
from graphopt.passes.base import Guarantee, Pass
from graphopt.report import operator_pages, recipe_pages
from graphopt.report.markdown import MARK, capital, cell, check_pages, write_pages

FAMILIES = {
    "clean": "Clean up: constants, duplicates, dead code, shape arithmetic",
    "raise": "Raise: exporters' spellings to one canonical operator each",
    "fold": "Fold: operators into the weights beside them",
    "quantize": "Quantize: fewer bits for a number",
    "depth": "Depth: fewer layers",
    "kv": "KV cache: fewer bytes for a token",
    "width": "Width: fewer heads, channels and neurons",
    "tokens": "Tokens: fewer tokens through the layers",
    "lower": "Lower: what the target was measured to run fastest",
}
"""Families in the order of a pipeline, with their headings; others follow by name."""

_OPTIONS = re.compile(r"^(?:\*\*Options:\*\*|Options:\n)\s*")
_DEFAULT = re.compile(r",?\s*default\s+[^,;)]+")


def page(cls: type[Pass]) -> str:
    """The page of one pass in Markdown.

    Made of the module's docstring (the one-line summary), the class docstring (the body; its paragraph `**Options:**`
    becomes a table) and the signature of `__init__` (names, types and defaults of the options).
    """
    parts = [MARK.format(source=_source(cls)), f"# {cls.name}", _facts(cls), _body(cls), _options(cls), _recipe(cls)]
    return "\n\n".join(part for part in parts if part) + "\n"


def summary(cls: type[Pass]) -> str:
    """The pass in one line without a full stop."""
    text = inspect.getdoc(sys.modules[cls.__module__]) or ""
    first = text.partition("\n")[0]
    name, colon, rest = first.partition(": ")
    # A file with one pass says "name: what it does"; several passes in one file each have their own first sentence.
    if not colon or name != cls.name:
        rest = re.split(r"(?<=[^.])\.(?:\s|$)", " ".join(_paragraphs(cls)[0].split()))[0] if _paragraphs(cls) else first
    return rest.rstrip(".")


def option_texts(cls: type[Pass]) -> dict[str, str]:
    """What the docstring's paragraph `**Options:**` says of each option, by name; unknown names are left out.

    The paragraph is a list or running text in which each option opens with its name, in backticks or at the start of a
    line: "`max_bytes` (bytes, default 16384): results up to this size are stored".
    """
    _, text = _split_options(cls)
    names = "|".join(re.escape(name) for name in cls.options())
    if not text or not names:
        return {}
    start = rf"(?:^[ ]*(?:[-*][ ]+)?|(?<=[.;][ ]))`({names})`(?=[\s:(])|^[ ]*({names})(?=:|[ ]\()"
    found = list(re.finditer(start, text, re.MULTILINE))
    ends = [m.start() for m in found[1:]] + [len(text)]
    return {m[1] or m[2]: _meaning(" ".join(text[m.end() : e].split())) for m, e in zip(found, ends, strict=False)}


def index(classes: Sequence[type[Pass]]) -> str:
    """The table of contents: families in the order of a pipeline, passes by name."""
    families: dict[str, list[type[Pass]]] = defaultdict(list)
    for cls in classes:
        families[cls.family].append(cls)
    lines = [MARK.format(source="graphopt/passes/"), "", "# Passes", ""]
    lines += ["`graphopt passes` prints this list, `graphopt passes show NAME` one page.", ""]
    order = list(FAMILIES)
    for family in sorted(families, key=lambda f: (order.index(f) if f in FAMILIES else len(order), f)):
        lines += [
            f"## {FAMILIES.get(family, family.capitalize())}",
            "",
            "| pass | what it does | guarantee |",
            "|---|---|---|",
        ]
        for cls in sorted(families[family], key=lambda c: c.name):
            lines.append(f"| [{cls.name}]({cls.name}.md) | {cell(capital(summary(cls)))} | {_guarantee(cls)} |")
        lines.append("")
    return "\n".join(lines)


def pages(classes: Sequence[type[Pass]] | None = None) -> dict[str, str]:
    """Every page by file name, with the contents `README.md`; of this package's passes unless others are given."""
    chosen = list(registry.builtin().values()) if classes is None else list(classes)
    return {"README.md": index(chosen), **{f"{cls.name}.md": page(cls) for cls in chosen}}


FOLDERS: dict[str, Callable[[Path], dict[str, str]]] = {
    "passes": lambda _: pages(),
    "operators": lambda _: operator_pages.pages(),
    "recipes": recipe_pages.pages,
    ".": lambda _: recipe_pages.contents(),
}
"""What makes the pages of each folder of `docs/`, given that folder, in which measurements are looked up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `python -m graphopt.report.pages`."""
    parser = argparse.ArgumentParser(prog="python -m graphopt.report.pages", description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="the folder with the folders of pages, for example docs")
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 where a page is out of date")
    given = parser.parse_args(arguments)
    problems: list[str] = []
    for name, made in FOLDERS.items():
        place = Path(given.folder) / name
        if given.check:
            problems += check_pages(place, made(Path(given.folder)))
        else:
            for path in write_pages(place, made(Path(given.folder))):
                print(path)
    for problem in problems:
        print(f"{problem}; run `make docs`.", file=sys.stderr)
    return 1 if problems else 0


# ---- the parts of a page


def _facts(cls: type[Pass]) -> str:
    head = "| family | guarantee | source |"
    facts = f"| {cls.family} | {_guarantee(cls)} | {cell(cls.paper) or '–'} |"
    bold = _sentence(summary(cls))
    # A docstring may open with the summary itself.
    lines = [] if _body(cls).replace("\n", " ").startswith(bold) else [f"**{bold}**", ""]
    lines += [head, "|---|---|---|", facts]
    if anchors := getattr(cls, "anchors", ()):
        lines += ["", f"Looks at: {', '.join(f'`{a}`' for a in anchors)}."]
    return "\n".join(lines)


def _guarantee(cls: type[Pass]) -> str:
    if cls.guarantee is Guarantee.LOSSY:
        return "lossy"
    return "exact, bit for bit" if cls.bitwise else "exact"


def _body(cls: type[Pass]) -> str:
    return _split_options(cls)[0]


def _options(cls: type[Pass]) -> str:
    options = cls.options()
    if not options:
        return "## Options\n\nNone."
    texts = option_texts(cls)
    lines = ["## Options", "", "| name | type | default | meaning |", "|---|---|---|---|"]
    for name, parameter in options.items():
        kind = "" if parameter.annotation is inspect.Parameter.empty else _type_name(parameter.annotation)
        default = "required" if parameter.default is inspect.Parameter.empty else f"`{_yaml(parameter.default)}`"
        lines.append(f"| `{name}` | {cell(kind)} | {cell(default)} | {cell(texts.get(name, ''))} |")
    return "\n".join(lines)


def _recipe(cls: type[Pass]) -> str:
    defaults = {n: p.default for n, p in cls.options().items() if p.default is not inspect.Parameter.empty}
    options = ", ".join(f"{name}: {_yaml(value)}" for name, value in defaults.items())
    step = f"{cls.name}: {{{options}}}" if options else cls.name
    return f"## In a recipe\n\n```yaml\npasses:\n  - {step}\n```"


# ---- reading the docstring


def _paragraphs(cls: type[Pass]) -> list[str]:
    return re.split(r"\n\s*\n", inspect.cleandoc(cls.__doc__ or "").strip())


def _split_options(cls: type[Pass]) -> tuple[str, str]:
    """The docstring without its paragraph `**Options:**`, and that paragraph (with a list that follows it)."""
    body: list[str] = []
    options: list[str] = []
    inside = False
    for paragraph in _paragraphs(cls):
        if match := _OPTIONS.match(paragraph):
            inside = True
            options.append(paragraph[match.end() :])
        elif inside and re.match(r"[-*] ", paragraph):
            options.append(paragraph)
        else:
            inside = False
            body.append(paragraph)
    return "\n\n".join(body), "\n".join(options).strip()


def _meaning(text: str) -> str:
    """ "(bytes, default 16384): results up to ..." -> "results up to ... (bytes)": the default has its own column."""
    match = re.match(r"\s*(?:\(([^()]*(?:\([^()]*\)[^()]*)*)\))?\s*:?\s*", text)
    assert match is not None  # every part of the pattern is optional
    unit = _DEFAULT.sub("", match[1] or "").strip(" ,;")
    rest = text[match.end() :].strip().rstrip(".;")
    return f"{rest} ({unit})" if unit and rest else rest or unit


def _type_name(annotation: object) -> str:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    return f"`{text}`"


def _yaml(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(_yaml(v) for v in value)}]"
    return str(value)


def _source(cls: type[Pass]) -> str:
    return cls.__module__.replace(".", "/") + ".py"


def _sentence(text: str) -> str:
    return f"{capital(text)}." if text else ""


if __name__ == "__main__":
    sys.exit(main())
