"""What operators do to the elements of their inputs: one rule an operator (see `rotary_forms`).

A rule gives the form of a value that its node makes, with a number of leading axes; None where it can't be told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int, cast_target
from graphopt.graph.constants import constant_array, scalar
from graphopt.passes.raise_.rotary_forms import Forms, Rule, Step
from graphopt.passes.raise_.rotary_terms import SIGN, Form, X, fits, lengthened, multiplied, negated, of_x, packed, term

_ALL = (1 << 31) - 1
"""As an end, what exporters write for all."""


def _operands(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Iterator[Form | None]:
    """The forms of the operands of an elementwise operator, their leading axes aligned to those of the result."""
    rank = forms.rank(value)
    for operand in node.inputs:
        assert operand is not None
        own = forms.rank(operand)
        if rank is None or own is None:
            yield None
            continue
        its_lead = max(own - (rank - lead), 0)
        missing = lead - its_lead
        yield forms.relead(
            forms.of(operand, its_lead), its_lead, [i - missing if i >= missing else None for i in range(lead)]
        )


def _sum(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """Terms of x side by side; tables alone are a new table."""
    a, b = _operands(forms, node, value, lead)
    if a is None or b is None:
        return None
    if node.op_type == "Sub":
        b = negated(b)
    if not (of_x(a) and of_x(b)):
        return forms.alike(value, lead, a, b)
    if a.shape[2:] != b.shape[2:]:
        return None
    return packed(np.concatenate([a, b]))


def _product(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """Signs and tables on terms; two tables are a new one."""
    a, b = node.inputs
    for one, other in ((a, b), (b, a)):
        number = scalar(one)
        if number is not None and abs(number) != 1.0 and one is not None and other is not None:
            if node.op_type == "Div" and one is a:
                return None
            fitting = (forms.rank(one) or 0) <= (forms.rank(other) or 0)
            return forms.stepped(forms.of(other, lead), Step(node.op_type, one)) if fitting else None
    first, second = _operands(forms, node, value, lead)
    if first is None or second is None:
        return None
    product = None if node.op_type == "Div" else multiplied(first, second)
    return forms.alike(value, lead, first, second) if product is None else product


def _negative(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """Every sign turned."""
    del value
    form = forms.of(_input(node), lead)
    return None if form is None else negated(form)


def _step(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """Cos, Sin and casts between floating-point types, element by element."""
    del value
    to = cast_target(node) if node.op_type == "Cast" else None
    if node.op_type == "Cast" and (to is None or not to.is_floating_point()):
        return None
    if node.op_type == "Cast":
        dtype = forms.facts.dtype(_input(node))
        if dtype is None or not dtype.is_floating_point():
            return None
    return forms.stepped(forms.of(_input(node), lead), Step(node.op_type, to=to))


def _slice(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """Elements between constants; rows between any."""
    rank, form = forms.rank(_input(node)), forms.of(_input(node), lead)
    axes = constant_array(node.inputs[3]) if len(node.inputs) > 3 else None
    if rank is None or form is None:
        return None
    if axes is not None and all(axis % rank < lead for axis in axes):
        return form if _is_whole(node) else forms.alike(value, lead, form)
    vectors = [constant_array(v) for v in node.inputs[1:]]
    known = [[int(n) for n in np.ravel(v)] for v in vectors if v is not None]
    if len(known) < len(vectors):
        return None
    starts, ends = known[:2]
    places = known[2] if len(known) > 2 else range(len(starts))
    steps = known[3] if len(known) > 3 else [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, places, steps, strict=True):
        if axis % rank < lead:
            if (start, step) != (0, 1) or end < _ALL:
                return None
            continue
        form = form[(slice(None),) * (axis % rank - lead + 2) + (slice(start, end, step),)]
    return form if form.size else None


def _is_whole(node: ir.Node) -> bool:
    """Whether a Slice certainly takes everything."""
    starts, ends, steps = (constant_array(node.inputs[i]) if i < len(node.inputs) else None for i in (1, 2, 4))
    if starts is None or ends is None or (len(node.inputs) > 4 and steps is None):
        return False
    return not starts.any() and bool((ends >= _ALL).all()) and (steps is None or bool((steps == 1).all()))


def _split(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """The elements of one part."""
    rank, axis = forms.rank(_input(node)), attribute_int(node, "axis", 0)
    if rank is None or axis is None or (axis % rank) < lead:
        return None
    form = forms.of(_input(node), lead)
    if form is None:
        return None
    place, which = axis % rank - lead + 2, value.index()
    given = constant_array(node.inputs[1]) if len(node.inputs) > 1 else None
    if len(node.inputs) > 1 and given is None:
        return None
    parts = len(node.outputs)
    size = -(-form.shape[place] // parts)
    sizes = [size] * parts if given is None else [int(n) for n in given]
    start = sum(sizes[: which or 0])
    return form[(slice(None),) * place + (slice(start, start + sizes[which or 0]),)]


def _gather(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """Elements by constant indices; rows by any."""
    rank, after, axis = forms.rank(_input(node)), forms.rank(value), attribute_int(node, "axis", 0)
    if rank is None or after is None or axis is None:
        return None
    of_rows = rank - (after - lead)
    if 0 <= axis % rank < of_rows:
        return forms.alike(value, lead, forms.of(_input(node), of_rows))
    index, form = constant_array(node.inputs[1]), forms.of(_input(node), lead)
    if index is None or form is None or axis % rank < lead:
        return None
    size = form.shape[axis % rank - lead + 2]
    if index.size == 0 or index.min() < -size or index.max() >= size:
        return None
    return np.take(form, np.asarray(index, dtype=np.int64), axis=axis % rank - lead + 2)


def _concat(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """The elements of all parts, where they are joined along elements."""
    rank, axis = forms.rank(value), attribute_int(node, "axis", 0)
    if rank is None or axis is None or (axis % rank) < lead:
        return None
    parts = [None if v is None else forms.of(v, lead) for v in node.inputs]
    known = [form for form in parts if form is not None]
    if len(known) < len(parts):
        return None
    terms = max(len(form) for form in known)
    padded = [lengthened(form, terms) for form in known]
    return np.concatenate(padded, axis=axis % rank - lead + 2)


def _reshape(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """Reshape, Squeeze, Unsqueeze and Flatten: elements keep their order, leading axes of size 1 come and go."""
    before, after = forms.facts.shape(_input(node)), forms.facts.shape(value)
    elements = forms.elements(value, lead)
    if before is None or after is None or elements is None:
        return None
    kept = [axis for axis in range(lead) if after[axis] != 1]
    count = int(np.prod(elements))
    for own in dict.fromkeys((lead, *reversed(range(len(before) + 1)))):
        inner = forms.elements(_input(node), own)
        if inner is None or int(np.prod(inner)) != count:
            continue
        old = [axis for axis in range(own) if before[axis] != 1]
        sources: list[int | None] = [None] * lead
        if own == lead and sum(before[axis] != after[axis] for axis in range(lead)) <= 1:
            sources = list(range(lead))  # the number of all elements is the same, so what may differ doesn't
        elif len(old) == len(kept) and all(before[o] == after[k] for o, k in zip(old, kept, strict=True)):
            for o, k in zip(old, kept, strict=True):
                sources[k] = o
        else:
            continue
        form = forms.relead(forms.of(_input(node), own), own, sources)
        if form is not None:
            return form.reshape(*form.shape[:2], *elements)
    return None


def _expand(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """An Expand, or what a Tile does that is one; a Tile that repeats elements in blocks is counted too."""
    before, after = forms.facts.shape(_input(node)), forms.facts.shape(value)
    elements = forms.elements(value, lead)
    if before is None or after is None or elements is None:
        return None
    own = max(lead + len(before) - len(after), 0)
    missing = lead - own
    form = forms.of(_input(node), own)
    if form is None:
        return None
    for axis in range(own):
        if before[axis] != after[axis + missing] and before[axis] != 1:
            return None
    if any((form[:, X] >= 0).ravel()) and any(before[i] != after[i + missing] for i in range(own)):
        return None
    form = forms.relead(form, own, [i - missing if i >= missing else None for i in range(lead)])
    if form is None:
        return None
    if node.op_type == "Tile":
        form = form.reshape(*form.shape[:2], *[1] * (len(elements) - (form.ndim - 2)), *form.shape[2:])
        return np.tile(form, [1, 1, *(n // m for n, m in zip(elements, form.shape[2:], strict=True))])
    return np.broadcast_to(form, (*form.shape[:2], *elements)) if fits(form.shape[2:], elements) else None


def _rotary(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """A RotaryEmbedding whose tables are [batch, positions, pairs]."""
    x, cos, sin = node.inputs[:3]
    size, interleaved = attribute_int(node, "rotary_embedding_dim", 0), attribute_int(node, "interleaved", 0)
    if len(node.inputs) > 3 or lead != 3 or forms.rank(value) != 4 or size is None or interleaved is None:
        return None
    assert x is not None
    assert cos is not None
    assert sin is not None
    form = forms.of(x, lead)
    tables = [forms.relead(forms.of(table, 2), 2, (0, None, 1)) for table in (cos, sin)]
    if form is None or tables[0] is None or tables[1] is None:
        return None
    count = form.shape[-1]
    size = size or count
    place = np.arange(size)
    pair, partner, first = place % (size // 2), (place + size // 2) % size, place < size // 2
    if interleaved:
        pair, partner, first = place // 2, place ^ 1, place % 2 == 0
    rest = np.arange(size, count)
    straight = np.broadcast_to(term(1, -1, -1, 0)[..., None], (1, 4, len(rest)))
    cosines = np.concatenate([tables[0][..., pair], straight], axis=-1)
    sines = np.concatenate([tables[1][..., pair], straight], axis=-1)
    sines[:, SIGN] *= np.concatenate([np.where(first, -1, 1), np.zeros(len(rest), np.int64)])
    own = multiplied(form, cosines)
    other = multiplied(form[..., np.concatenate([partner, rest])], sines)
    return None if own is None or other is None else packed(np.concatenate([own, other]))


def _transpose(forms: Forms, node: ir.Node, value: ir.Value, lead: int) -> Form | None:
    """Leading axes among themselves, axes of elements among themselves."""
    del value
    rank, attribute = forms.rank(_input(node)), node.attributes.get("perm")
    if rank is None or attribute is None or attribute.is_ref():
        return None
    perm = list(attribute.as_ints())
    if any(axis >= lead for axis in perm[:lead]):
        return None
    form = forms.of(_input(node), lead)
    if form is None:
        return None
    form = form.transpose(0, 1, *(axis - lead + 2 for axis in perm[lead:]))
    return forms.relead(form, lead, perm[:lead])


RULES: Mapping[str, Rule] = {
    "Add": _sum, "Sub": _sum, "Mul": _product, "Div": _product, "Neg": _negative,
    "Cos": _step, "Sin": _step, "Cast": _step, "Slice": _slice, "Split": _split,
    "Gather": _gather, "Concat": _concat, "Reshape": _reshape, "Squeeze": _reshape,
    "Unsqueeze": _reshape, "Flatten": _reshape, "Expand": _expand, "Tile": _expand,
    "Transpose": _transpose, "RotaryEmbedding": _rotary,
}  # fmt: skip


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value
