"""One Markdown page for each operator of graphopt's, made from its `OPERATOR`: what `docs/operators/` holds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir

from graphopt.report.markdown import MARK, capital, cell, table
from graphopt.runtime_ops.operator import DOMAIN, OLDEST_OPSET, VERSION, Operator, Parameter, folder_of, operators

_FOLDER = "graphopt/runtime_ops"
_KERNELS = {"cpu.cc": "CPU", "cuda.cc": "CUDA"}


def pages() -> dict[str, str]:
    """Every page by file name, with the contents `README.md`."""
    found = list(operators().values())
    return {"README.md": index(found), **{f"{operator.name}.md": page(operator) for operator in found}}


def index(found: Sequence[Operator]) -> str:
    """The table of contents."""
    rows = [[f"[{o.name}]({o.name}.md)", cell(o.summary), _kernels(o)] for o in found]
    text = (
        f"Operators of the domain `{DOMAIN}`, for what ordinary operators can't do or do slowly. A model holds the\n"
        "portable body of each that it uses, so it runs on any ONNX Runtime; where graphopt's library is registered,\n"
        "as `graphopt.session` does, the kernels run instead\n"
        "([sessions](../user-guide.md#models-with-operators-of-graphopts))."
    )
    more = "[Write an operator](../write-an-operator.md) says how one is made."
    return "\n\n".join([MARK.format(source=f"{_FOLDER}/"), "# Operators", text, _table(rows), more]) + "\n"


def page(operator: Operator) -> str:
    """The page of one operator."""
    folder = f"{_FOLDER}/{folder_of(operator.name)}"
    facts = [
        f"`{DOMAIN}`, version {VERSION}",
        ", ".join(f"`{kind}`" for kind in operator.types),
        _kernels(operator),
        cell(operator.source) or "–",
    ]
    parts = [
        MARK.format(source=f"{folder}/__init__.py"),
        f"# {operator.name}",
        f"**{operator.summary}**",
        table(["domain", "types of T", "kernels", "source"], [facts]),
        operator.description.strip(),
        "## Inputs",
        _parameters(operator.inputs),
        "## Outputs",
        _parameters(operator.outputs),
        "## Attributes",
        _attributes(operator),
        "## Body",
        _body(operator, folder),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    return table(["operator", "what it does", "kernels"], rows)


def _kernels(operator: Operator) -> str:
    folder = Path(__file__).parents[1] / "runtime_ops" / folder_of(operator.name)
    there = [name for file, name in _KERNELS.items() if (folder / file).is_file()]
    return ", ".join(there) or "none: the body serves"


def _parameters(parameters: Sequence[Parameter]) -> str:
    rows = [
        [f"`{p.name}`", f"`{p.type}`", f"`{cell(p.shape)}`", cell(capital(p.meaning)) + " (optional)" * p.optional]
        for p in parameters
    ]
    return table(["name", "type", "shape", "meaning"], rows)


def _attributes(operator: Operator) -> str:
    if not operator.attributes:
        return "None."
    rows = []
    for a in operator.attributes:
        default = list(a.default) if isinstance(a.default, tuple) else a.default
        rows.append(
            [f"`{a.name}`", f"`{a.type}`", "required" if default is None else f"`{default}`", cell(capital(a.meaning))]
        )
    note = "A node has all of them: a kernel never sees a default."
    return f"{table(['name', 'type', 'default', 'meaning'], rows)}\n\n{note}"


def _body(operator: Operator, folder: str) -> str:
    nodes = ir.traversal.RecursiveGraphIterator(operator.bodies()[0].graph)
    used = sorted({node.op_type for node in nodes})
    return (
        f"The portable body ([body.py](../../{folder}/body.py)) defines the operator's numbers. It needs opset "
        f"{OLDEST_OPSET},\nand consists of {', '.join(used)}."
    )
