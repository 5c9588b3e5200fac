"""What a model's inputs are: the role of each, and which of their dynamic dimensions go together."""

from __future__ import annotations

import ast
import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import onnx_ir as ir

from graphopt.errors import VerificationError
from graphopt.verification.input_ranges import IntegerUse, integer_uses

Role = Literal["float", "past", "index", "mask", "position", "length", "scalar", "integer", "text"]
"""What an input holds. "past" is a key/value cache, "index" goes into a table, "length" counts per row of the batch."""

Kind = Literal["batch", "sequence", "past", "space", "free"]
"""What a dynamic dimension counts. "space" is the height or width of an image, "free" anything else."""

_UNNAMED = re.compile(r"^(|\?|-?\d+|None)$")
_SEQUENCE = re.compile(r"seq|len|time|frame|sample|token", re.IGNORECASE)
_PAST = re.compile(r"past|cache|key_values", re.IGNORECASE)


def _single(variable: str) -> bool:
    """Whether a variable stands for one dimension of one input ("input[axis]"), because that has no name of its own."""
    return variable.endswith("]")


@dataclasses.dataclass(frozen=True)
class Expression:
    """A dimension that is computed from variables, such as "past + sequence"."""

    text: str
    variables: tuple[tuple[str, str], ...]
    """Pairs of a name in `text` and the variable that it stands for."""

    def value(self, size: Callable[[str], int]) -> int:
        """The dimension's size, given the sizes of the variables."""
        names = {name: size(variable) for name, variable in self.variables}
        return max(0, int(_evaluate(ast.parse(self.text, mode="eval").body, names)))


@dataclasses.dataclass(frozen=True)
class Input:
    """One input that has to be fed.

    Attributes:
        name: Its name.
        dtype: Its element type.
        dims: Sizes; the name of a variable, or an expression, where a dimension is dynamic.
        role: What it holds.
        use: What the graph does with it where it is an integer or Boolean.
    """

    name: str
    dtype: ir.DataType
    dims: tuple[int | str | Expression, ...]
    role: Role
    use: IntegerUse

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The input's shape; `sizes` may name a single dimension as "input[axis]" to set it apart from its variable."""
        result = []
        for axis, dim in enumerate(self.dims):
            own = sizes.get(f"{self.name}[{axis}]")
            if own is not None:
                result.append(own)
            elif isinstance(dim, int):
                result.append(dim)
            else:
                result.append(sizes[dim] if isinstance(dim, str) else dim.value(sizes.__getitem__))
        return tuple(result)


@dataclasses.dataclass(frozen=True)
class Signature:
    """The inputs that have to be fed, and the variables (dynamic sizes) of their shapes with their kinds."""

    inputs: tuple[Input, ...]
    variables: dict[str, Kind]

    @property
    def decodes(self) -> bool:
        """Whether there is a key/value cache among the inputs."""
        return "past" in self.variables.values()

    def with_role(self, role: Role) -> list[Input]:
        """The inputs of one role."""
        return [i for i in self.inputs if i.role == role]


def signature(model: ir.Model) -> Signature:
    """Read the signature of `model`.

    Dimensions of the same symbol are the same variable; the first dimensions of all inputs, the lengths of all
    caches, and the batch dimension of recurrent states ([layers, batch, hidden]) are taken for the same too. That is
    a first guess: files exist that declare one symbol for different sizes.

    Raises:
        VerificationError: An input is no tensor.
    """
    values = [v for v in model.graph.inputs if not v.is_initializer()]
    for value in values:
        if value.type is not None and not isinstance(value.type, ir.TensorType):
            raise VerificationError(
                f"Input {value.name!r} is no tensor but {value.type}; graphopt can't feed such a model, "
                "so run it without verification or split off what makes this input."
            )
    uses = integer_uses(model)
    roles = {v.name or "": _role(v, uses.get(v.name or "", IntegerUse())) for v in values}
    return _Builder(values, roles, uses).build()


class _Builder:
    """Puts dynamic dimensions together in classes."""

    def __init__(self, values: list[ir.Value], roles: dict[str, Role], uses: dict[str, IntegerUse]) -> None:
        self.values, self.roles, self.uses = values, roles, uses
        self.parent: dict[str, str] = {}
        self.kinds: dict[str, Kind] = {}

    def build(self) -> Signature:
        dynamic = list(self._dynamic())
        symbols = {symbol for _, _, symbol in dynamic if symbol is not None}
        keys: dict[tuple[str, int], str] = {}
        expressions: dict[tuple[str, int], tuple[str, list[str]]] = {}
        for value, axis, symbol in dynamic:
            name = value.name or ""
            parts = _parts(symbol, symbols) if symbol is not None else None
            if parts is not None and symbol is not None:
                expressions[name, axis] = (symbol, parts)
                for part in parts:
                    self.parent.setdefault(part, part)
            else:
                keys[name, axis] = symbol if symbol is not None else f"{name}[{axis}]"
                self.parent.setdefault(keys[name, axis], keys[name, axis])
        self._join(keys)
        self._name_kinds(keys, [part for _, parts in expressions.values() for part in parts])
        variables: dict[str, Kind] = {}
        for key in self.parent:
            variables.setdefault(self._find(key), self.kinds.get(self._find(key), "free"))
        inputs = []
        for value in self.values:
            name, dims = value.name or "", []
            for axis, size in enumerate(value.shape if value.shape is not None else ()):
                dim: int | str | Expression
                if isinstance(size, int) and size >= 0:
                    dim = size
                elif (name, axis) in expressions:
                    text, parts = expressions[name, axis]
                    dim = Expression(text, tuple((part, self._find(part)) for part in parts))
                else:
                    dim = self._find(keys[name, axis])
                dims.append(self._total(value, axis, dim, variables))
            assert value.dtype is not None
            inputs.append(Input(name, value.dtype, tuple(dims), self.roles[name], self.uses.get(name, IntegerUse())))
        used = {d for i in inputs for d in i.dims if isinstance(d, str)}
        used |= {v for i in inputs for d in i.dims if isinstance(d, Expression) for _, v in d.variables}
        return Signature(tuple(inputs), {k: v for k, v in variables.items() if k in used})

    def _dynamic(self) -> Iterator[tuple[ir.Value, int, str | None]]:
        for value in self.values:
            for axis, size in enumerate(value.shape if value.shape is not None else ()):
                if isinstance(size, int) and size >= 0:
                    continue
                text = "" if isinstance(size, int) or size.value is None else str(size.value)
                yield value, axis, None if _UNNAMED.match(text) else text

    def _find(self, key: str) -> str:
        while self.parent[key] != key:
            key = self.parent[key]
        return key

    def _merge(self, keys: list[str]) -> None:
        for key in keys[1:]:
            self.parent[self._find(key)] = self._find(keys[0])

    def _join(self, keys: dict[tuple[str, int], str]) -> None:
        ranks = {v.name or "": len(v.shape) for v in self.values if v.shape is not None}
        first = [
            key
            for (name, axis), key in keys.items()
            if axis == 0
            and (_single(key) or "batch" in key.lower() or not _SEQUENCE.search(key))
            and (ranks[name] > 1 or len(ranks) > 1)
        ]
        states = [
            key
            for (name, axis), key in keys.items()
            if axis == 1 and _single(key) and (name, 0) not in keys and ranks[name] >= 3 and first
        ]
        self._merge(first + states)
        if first:
            self.kinds[self._find(first[0])] = "batch"
        past = [
            key
            for (name, axis), key in keys.items()
            if self.roles[name] == "past"
            and self._find(key) not in self.kinds
            and not re.search(r"encoder", key + name, re.IGNORECASE)
        ]
        self._merge(past)
        if past:
            self.kinds[self._find(past[0])] = "past"

    def _name_kinds(self, keys: dict[tuple[str, int], str], parts: list[str]) -> None:
        ranks = {v.name or "": len(v.shape) for v in self.values if v.shape is not None}
        for (name, axis), key in keys.items():
            kind: Kind = "free"
            if not _single(key) and "batch" in key.lower():
                kind = "batch"
            elif self.roles[name] in ("index", "position", "mask", "length") and axis >= 1:
                kind = "sequence"
            elif self.roles[name] == "float" and ranks[name] == 4:
                kind = "space"
            elif self.roles[name] == "float" and ranks[name] == 3 and _SEQUENCE.search(key) and not _single(key):
                kind = "sequence"
            self.kinds.setdefault(self._find(key), kind)
        for part in parts:
            self.kinds.setdefault(self._find(part), "past" if _PAST.search(part) else "sequence")

    def _total(
        self, value: ir.Value, axis: int, dim: int | str | Expression, variables: dict[str, Kind]
    ) -> int | str | Expression:
        """The mask of a decoder covers what is in the cache and what is new, whatever symbol is declared for that."""
        if not isinstance(dim, str) or self.roles[value.name or ""] != "mask" or value.shape is None:
            return dim
        lengths = [k for k, kind in variables.items() if kind == "past"]
        new = [self._find(f) for f in self._new_lengths()]
        if not lengths or not new or axis != len(value.shape) - 1 or dim == new[0] or variables[dim] == "batch":
            return dim
        return Expression("past + new", (("past", lengths[0]), ("new", new[0])))

    def _new_lengths(self) -> Iterator[str]:
        """Keys of the sequence dimension of token ids or embeddings, which is what a decoder step adds."""
        for value, axis, symbol in self._dynamic():
            name = value.name or ""
            role = self.roles[name]
            if (axis == 1 and role == "index") or (axis == 1 and role == "float" and len(value.shape or ()) == 3):
                yield symbol if symbol is not None else f"{name}[{axis}]"


def _role(value: ir.Value, use: IntegerUse) -> Role:
    name, dtype = (value.name or "").lower(), value.dtype
    if dtype is None:
        raise VerificationError(f"Input {value.name!r} declares no element type; declare one in the file.")
    rank = len(value.shape) if value.shape is not None else 0
    if dtype == ir.DataType.STRING:
        return "text"
    if _is_past(value):
        return "past"
    if dtype.is_floating_point():
        return "mask" if "mask" in name and rank >= 2 else "float"
    if rank == 0 or (value.shape is not None and all(d == 1 for d in value.shape)):
        return "scalar"
    if "position" in name or use.positions:
        return "position"
    if use.limit is not None and "mask" not in name:
        return "index"
    if "mask" in name or (rank >= 2 and use.masks) or (dtype == ir.DataType.BOOL and rank >= 2):
        return "mask"
    if rank == 1 and "len" in name:
        return "length"
    return "integer"


_ATTENDS = ("Attention", "GroupQueryAttention", "MultiHeadAttention", "CachedAttention", "QuantizedKVAttention")


def _is_past(value: ir.Value) -> bool:
    """A cache is named so, or a Concat puts it before what is new and returns the whole."""
    if value.shape is None or len(value.shape) < 3 or value.dtype is None:
        return False
    if not value.dtype.is_floating_point() and value.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        return False
    if not any(not isinstance(d, int) for d in value.shape[1:]):
        return False
    if _PAST.search(value.name or ""):
        return True
    for node, slot in value.uses():
        if node.op_type == "Concat" and slot == 0 and len(node.inputs) == 2 and node.outputs[0].is_graph_output():
            return True
        if node.op_type in _ATTENDS and slot >= 3:
            return True
    return False


def _parts(symbol: str, symbols: set[str]) -> list[str] | None:
    """The names in a symbol that is a sum or product of others; None where it is a name of its own."""
    if not re.search(r"[+*/-]", symbol):
        return None
    try:
        tree = ast.parse(symbol, mode="eval")
        names = sorted({n.id for n in ast.walk(tree) if isinstance(n, ast.Name)} - {"floor", "ceil", "max", "min"})
        _evaluate(tree.body, dict.fromkeys(names, 7))
    except (SyntaxError, ValueError, ZeroDivisionError):
        return None
    # "batch-size" is a name, not a difference: a part must occur on its own, or the sum be written as one.
    if names and (all(n in symbols for n in names) or " + " in symbol):
        return names
    return None


_OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Pow: lambda a, b: a**b if abs(b) <= 4 else math.nan,
    ast.Mod: lambda a, b: a % b,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"floor": math.floor, "ceil": math.ceil, "max": max, "min": min}


def _evaluate(tree: ast.expr, names: Mapping[str, int]) -> float:
    """The value of a parsed dimension expression.

    Raises:
        ValueError: It holds more than numbers, names, arithmetic, and floor, ceil, max and min.
    """
    match tree:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return float(_OPERATORS[type(op)](_evaluate(left, names), _evaluate(right, names)))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_evaluate(operand, names)
        case ast.Call(func=ast.Name(id=name), args=args) if name in _FUNCTIONS:
            return float(_FUNCTIONS[name](*(_evaluate(a, names) for a in args)))
    raise ValueError("not an arithmetic expression")
