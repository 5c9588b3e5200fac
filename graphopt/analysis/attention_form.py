"""What an attention consists of, whatever views and spellings it is written in: operands with the roles of their axes.

`read(softmax, facts)` is an `AttentionForm`, or raises `NotAttention` with the node and the fact that is missing.
"""

from __future__ import annotations

import dataclasses

import onnx_ir as ir

from graphopt.analysis.algebra import is_op, producer
from graphopt.analysis.attention_scores import (
    Bias,
    Keep,
    NotAttention,
    Path,
    Scores,
    check_weighing,
    paths,
    read_scores,
)
from graphopt.analysis.dims import Dim
from graphopt.analysis.layout import Atom, Axes, NotAView, Stage, above, below, plain_axes, settled, total
from graphopt.analysis.shapes import ShapeFacts
from graphopt.graph.constants import scalar

__all__ = ["AttentionForm", "Bias", "Keep", "NotAttention", "Operand", "Roles", "concatenated", "operands", "read"]

_LONGEST = 16

Roles = tuple[tuple[Atom, ...], tuple[Atom, ...], tuple[Atom, ...], tuple[Atom, ...]]
"""The atoms of batch, head, sequence and depth."""


@dataclasses.dataclass(frozen=True)
class Operand:
    """Queries, keys or values.

    Attributes:
        stages: The operand of the product and what it is made of by views and numbers, nearest first.
        roles: Batch, head, sequence, depth; heads of keys and values without repetition.
    """

    stages: list[Stage]
    roles: Roles

    @property
    def sizes(self) -> tuple[Dim, Dim, Dim, Dim]:
        """The lengths of batch, head, sequence and depth."""
        b, h, s, d = self.roles
        return total(b), total(h), total(s), total(d)


@dataclasses.dataclass(frozen=True)
class AttentionForm:
    """softmax(scores(q, k)) · v.

    Attributes:
        path: The nodes.
        q: The queries.
        k: The keys.
        v: The values.
        scores: What happens to the scores.
        output: The value that holds the result.
        output_axes: Its axes, in atoms of `output_roles`.
        output_roles: Batch, head, sequence, depth of the result.
    """

    path: Path
    q: Operand
    k: Operand
    v: Operand
    scores: Scores
    output: ir.Value
    output_axes: Axes
    output_roles: Roles

    @property
    def heads(self) -> int | None:
        """The number of heads of the queries."""
        return self.q.sizes[1].value

    @property
    def kv_heads(self) -> int | None:
        """The number of heads of keys and values."""
        return self.k.sizes[1].value

    @property
    def head_size(self) -> int | None:
        """Elements of one query."""
        return self.q.sizes[3].value


def read(softmax: ir.Node, facts: ShapeFacts) -> AttentionForm | None:
    """The attention around a Softmax; None where it isn't between two products.

    Args:
        softmax: The node.
        facts: Shapes; those made with `believe_names` see more.

    Raises:
        NotAttention: It is between two products, and a fact is missing.
    """
    reason: NotAttention | None = None
    for path in paths(softmax):
        try:
            return _read(path, facts)
        except NotAttention as found:
            reason = reason or found
        except NotAView as found:
            reason = reason or NotAttention(str(found))
    if reason is not None:
        raise reason
    return None


def _read(path: Path, facts: ShapeFacts) -> AttentionForm:
    check_weighing(path)
    q_value, k_value = path.product.inputs
    assert q_value is not None
    assert k_value is not None
    q_axes, k_axes = plain_axes(q_value, facts), plain_axes(k_value, facts)
    scoring = contraction(path.product, len(q_axes), len(k_axes))
    q_stages, k_stages = climb(q_value, q_axes, facts), climb(k_value, k_axes, facts)
    queries, keys = scoring.rows(q_axes, k_axes)
    scores = read_scores(path, scoring.result(queries, keys), facts)
    if scores.axes[scores.keys] and set(settled(scores.axes)[scores.keys]) <= set(_leaves(queries[-2])):
        # The product is keys times queries, exchanged afterwards.
        scores = read_scores(path, scoring.result(queries, keys, 1), facts)
        queries, keys, q_stages, k_stages = keys, queries, k_stages, q_stages
    axes = scores.axes
    for node in path.weighing:
        if not is_op(node, "Cast", "Dropout", "Where"):
            axes = below(node, axes, facts)
    v_value = path.weighted.inputs[1 - path.place]
    assert v_value is not None
    v_axes = plain_axes(v_value, facts)
    v_stages = climb(v_value, v_axes, facts)
    factors = (axes, v_axes) if path.place == 0 else (v_axes, axes)
    weighting = contraction(path.weighted, len(factors[0]), len(factors[1]))
    if path.weighted.op_type == "FusedMatMul" and not _plain_alpha(path.weighted):
        raise NotAttention(f"{path.weighted.name!r} multiplies the result by a number")
    rows = weighting.rows(*factors)
    weights, values = rows[path.place], _exchanged(rows[1 - path.place])
    if set(settled(weights)[-1]) != set(settled(scores.axes)[scores.keys]):
        raise NotAttention("the sum over the values isn't along the axis of the Softmax")
    output, out_axes = path.weighted.outputs[0], weighting.result(*rows, first=path.place)
    q_roles, k_roles, v_roles = _roles(queries, keys, values, weights)
    out_roles: Roles = (q_roles[0], q_roles[1], q_roles[2], v_roles[3])
    out_roles, output, out_axes = _following(out_roles, output, out_axes, facts)
    return AttentionForm(
        path, Operand(q_stages, q_roles), Operand(k_stages, k_roles), Operand(v_stages, v_roles), scores,
        output, out_axes, out_roles,
    )  # fmt: skip


def operands(node: ir.Node, facts: ShapeFacts) -> tuple[Operand, Operand, Operand]:
    """Queries, keys and values of an `Attention` with operands of four axes; heads without repetition.

    Raises:
        NotAttention: A fact is missing.
    """
    found = []
    for value in node.inputs[:3]:
        assert value is not None
        axes = plain_axes(value, facts)
        if len(axes) != 4:
            raise NotAttention(f"{value.name!r} hasn't four axes")
        found.append((axes, climb(value, axes, facts)))
    (q, q_stages), (k, k_stages), (v, v_stages) = found
    q_roles, k_roles, v_roles = _roles(q, k, v, (q[0], q[1], q[2], k[2]))
    return Operand(q_stages, q_roles), Operand(k_stages, k_roles), Operand(v_stages, v_roles)


def climb(value: ir.Value, axes: Axes, facts: ShapeFacts) -> list[Stage]:
    """`value`, and what it is made of through views, repetitions and multiplications by a number, nearest first."""
    stages = [Stage(value, axes, 1.0, ())]
    for _ in range(_LONGEST):
        last = stages[-1]
        node = last.value.producer()
        if node is None:
            break
        if is_op(node, "Mul", "Div") and len(node.inputs) == 2:
            found = _scaled(node, facts)
            if found is None:
                break
            source, number = found
            stages.append(Stage(source, last.axes, last.factor * number, (*last.scales, node)))
            continue
        try:
            source, axes = above(node, last.axes, facts)
        except NotAView:
            break
        stages.append(Stage(source, axes, last.factor, last.scales))
    return stages


def _scaled(node: ir.Node, facts: ShapeFacts) -> tuple[ir.Value, float] | None:
    """(x, c) where `node` is c · x with the shape of x."""
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        number, source = scalar(node.inputs[1 - index]), node.inputs[index]
        if number is None or source is None or number == 0:
            continue
        rank, shape = facts.shape(source), facts.shape(node.outputs[0])
        if rank is None or shape is None or len(rank) != len(shape):
            return None
        return source, 1 / number if node.op_type == "Div" else number
    return None


# ---- the products


@dataclasses.dataclass(frozen=True)
class Contraction:
    """A product of two tensors over one axis, however it is written.

    Attributes:
        left: The order of the axes of the left operand that makes it [batch ..., rows, summed].
        right: That of the right operand.
        out: For each axis of the result its place among [batch ..., rows of the left, rows of the right].
    """

    left: tuple[int, ...]
    right: tuple[int, ...]
    out: tuple[int, ...]

    def rows(self, a: Axes, b: Axes) -> tuple[Axes, Axes]:
        """Both operands as [batch ..., rows, summed]."""
        return tuple(a[axis] for axis in self.left), tuple(b[axis] for axis in self.right)

    def result(self, a: Axes, b: Axes, first: int = 0) -> Axes:
        """The axes of the result for operands in rows; batch axes are those of operand `first` where it has them."""
        rank = len(self.out)
        a, b = ((),) * (rank - len(a)) + a, ((),) * (rank - len(b)) + b
        batch, other = (a[:-2], b[:-2]) if first == 0 else (b[:-2], a[:-2])
        joined = (*(x or y for x, y in zip(batch, other, strict=True)), a[-2], b[-2])
        return tuple(joined[axis] for axis in self.out)


def contraction(node: ir.Node, left_rank: int, right_rank: int) -> Contraction:
    """How a MatMul, FusedMatMul or Einsum multiplies operands of these ranks.

    Raises:
        NotAttention: It isn't a product of matrices, or sums over something else than one axis.
    """
    if is_op(node, "Einsum"):
        return _einsum(node)
    if left_rank < 2 or right_rank < 2:
        raise NotAttention(f"an operand of {node.name!r} is a vector")
    attributes = {} if node.op_type == "MatMul" else node.attributes
    flags = {name: attribute.as_int() != 0 for name, attribute in attributes.items() if name.startswith("trans")}
    if flags.get("transBatchA") or flags.get("transBatchB"):
        raise NotAttention(f"FusedMatMul {node.name!r} exchanges batch axes")
    left, right = tuple(range(left_rank)), tuple(range(right_rank))
    if flags.get("transA"):
        left = (*left[:-2], left[-1], left[-2])
    if not flags.get("transB"):
        right = (*right[:-2], right[-1], right[-2])
    return Contraction(left, right, tuple(range(max(left_rank, right_rank))))


def _einsum(node: ir.Node) -> Contraction:
    equation = node.attributes["equation"].as_string().replace(" ", "")
    operands, _, out = equation.partition("->")
    left, _, right = operands.partition(",")
    batch = [letter for letter in out if letter in left and letter in right]
    rows = [
        [letter for letter in side if letter in out and letter not in other]
        for side, other in ((left, right), (right, left))
    ]
    summed = [letter for letter in left if letter in right and letter not in out]
    letters = [*batch, *rows[0], *rows[1]]
    if "." in equation or any(len(found) != 1 for found in (*rows, summed)) or sorted(letters) != sorted(out):
        raise NotAttention(f"Einsum {node.name!r} ({equation}) isn't a product of matrices")
    sides = [
        tuple(side.index(letter) for letter in (*batch, own[0], summed[0]))
        for side, own in ((left, rows[0]), (right, rows[1]))
    ]
    if any(len(order) != len(side) for order, side in zip(sides, (left, right), strict=True)):
        raise NotAttention(f"Einsum {node.name!r} ({equation}) isn't a product of matrices")
    return Contraction(sides[0], sides[1], tuple(letters.index(letter) for letter in out))


def _plain_alpha(node: ir.Node) -> bool:
    alpha = node.attributes.get("alpha")
    return alpha is None or (not alpha.is_ref() and alpha.as_float() == 1.0)


def _exchanged(axes: Axes) -> Axes:
    return (*axes[:-2], axes[-1], axes[-2])


# ---- the roles


def _leaves(atoms: tuple[Atom, ...]) -> tuple[Atom, ...]:
    return tuple(leaf for atom in atoms for leaf in atom.leaves())


def _roles(q: Axes, k: Axes, v: Axes, weights: Axes) -> tuple[Roles, Roles, Roles]:
    """Batch, head, sequence and depth of operands given as [..., rows, depth] (values: [..., keys, depth])."""
    q, k = _alike(q, k)
    batch_axes, head_axes = _split(q, k)
    batch = _join(q[:batch_axes])
    heads = _join(q[batch_axes : batch_axes + head_axes])
    if len(q) == 3:
        batch, heads = _merged(q[0])
    q_roles: Roles = (batch, heads, q[-2], q[-1])
    k_roles = _shared(k, (batch_axes, head_axes), q_roles, "keys")
    weights, v = _alike(weights, v)
    v_roles = _shared(v, _split(weights, v), q_roles, "values")
    if total(k_roles[1]) != total(v_roles[1]):
        raise NotAttention(f"keys have {total(k_roles[1])} heads, values {total(v_roles[1])}")
    return q_roles, k_roles, v_roles


def _alike(a: Axes, b: Axes) -> tuple[Axes, Axes]:
    rank = max(len(a), len(b))
    return settled(((),) * (rank - len(a)) + a), settled(((),) * (rank - len(b)) + b)


def _shared(axes: Axes, split: tuple[int, int], q: Roles, what: str) -> Roles:
    """The roles of keys or values, which share batch and heads with the queries."""
    batch_axes, head_axes = split
    batch, heads = q[:2]
    own_batch = _join(axes[:batch_axes])
    own_heads = _join(axes[batch_axes : batch_axes + head_axes])
    if len(axes) == 3:
        own_batch, own_heads = _merged_like(axes[0], batch)
    if any(atom.repeat for atom in own_batch):
        raise NotAttention(f"the {what} of one entry of the batch serve several")
    if total(own_batch) == 1 and total(batch).value != 1:
        raise NotAttention(f"one set of {what} serves the whole batch")
    if total(batch) == 1 and total(own_batch).value != 1:
        raise NotAttention("one set of queries serves the whole batch")
    return own_batch, _grouped(heads, own_heads, what), axes[-2], axes[-1]


def _split(q: Axes, k: Axes) -> tuple[int, int]:
    """How many leading axes are the batch, and how many after them the heads."""
    leading = len(q) - 2
    if leading <= 1:
        return leading, 0
    grouped = leading >= 3 and q[-3] and (not k[-3] or all(atom.repeat for atom in k[-3]))
    return (leading - 2, 2) if grouped else (leading - 1, 1)


def _join(axes: Axes) -> tuple[Atom, ...]:
    return tuple(atom for axis in axes for atom in axis)


def _merged(axis: tuple[Atom, ...]) -> tuple[tuple[Atom, ...], tuple[Atom, ...]]:
    """Batch and heads that share an axis: heads are what has a constant length, the batch what is outside of it."""
    if len(axis) == 1:
        return ((), axis) if axis[0].size.value is not None else (axis, ())
    return axis[:1], axis[1:]


def _merged_like(axis: tuple[Atom, ...], batch: tuple[Atom, ...]) -> tuple[tuple[Atom, ...], tuple[Atom, ...]]:
    for count in range(len(axis) + 1):
        if total(axis[:count]) == total(batch):
            return axis[:count], axis[count:]
    raise NotAttention("batch and heads share an axis that isn't split alike for queries, keys and values")


def _grouped(heads: tuple[Atom, ...], own: tuple[Atom, ...], what: str) -> tuple[Atom, ...]:
    """The heads of keys or values without repetition; query heads of one group must be neighbours."""
    kept = tuple(atom for atom in own if not atom.repeat)
    if own[: len(kept)] != kept and total(kept).value != 1:
        raise NotAttention(f"the heads of the {what} are repeated in another order than group by group")
    count, all_heads = total(kept), total(heads)
    if count != all_heads and all_heads.exact_div(count) is None:
        raise NotAttention(f"{all_heads} heads of queries don't share {count} heads of {what} evenly")
    return kept


def _following(roles: Roles, output: ir.Value, axes: Axes, facts: ShapeFacts) -> tuple[Roles, ir.Value, Axes]:
    """Where the result has the axes batch, head, sequence, depth: at the product, or behind views that follow it."""
    start = roles, output, axes
    for _ in range(4):
        leaves: Roles = tuple(map(_leaves, roles))  # type: ignore[assignment]
        if settled(axes) == leaves:
            return leaves, output, axes
        if len(output.uses()) != 1 or output.is_graph_output():
            break
        node = next(iter(output.uses())).node
        try:
            axes = below(node, axes, facts)
        except NotAView:
            break
        output = node.outputs[0]
    return tuple(map(_leaves, start[0])), start[1], start[2]  # type: ignore[return-value]


def concatenated(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """(past, new) where `value` appends to a cache that is an input of its graph along the sequence of
    [batch, head, sequence, depth]."""
    node = producer(value, "Concat")
    if node is None or len(node.inputs) != 2:
        return None
    past, new = node.inputs
    axis = node.attributes.get("axis")
    if past is None or new is None or axis is None or axis.is_ref() or axis.as_int() not in (2, -2):
        return None
    return (past, new) if past.is_graph_input() and past is not new else None
