"""Operators that move or make elements, as rules of `graphopt.analysis.elements`."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.analysis.algebra import attribute_int
from graphopt.analysis.conditions import FALSE, TRUE
from graphopt.analysis.dim_functions import follows, maximum
from graphopt.analysis.dims import Dim, as_symbol
from graphopt.analysis.elements import Elements, Indices, SameSize, rule
from graphopt.analysis.leaves import Cases, Element, OpaqueError, Poly
from graphopt.analysis.shapes import Shape


def _shape(elements: Elements, value: ir.Value | None) -> Shape:
    shape = elements.facts.shape(value)
    if shape is None:
        raise OpaqueError("the shape of an input isn't known")
    return shape


def _numbers(elements: Elements, node: ir.Node, place: int, name: str) -> list[Dim] | None:
    """A list that is an attribute or, in later opsets, an input."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return [Dim.of(int(n)) for n in attribute.as_ints()]
    if place >= len(node.inputs) or node.inputs[place] is None:
        return None
    content = elements.facts.data(node.inputs[place])
    if content is None:
        raise OpaqueError(f"the {name} aren't known")
    return list(content.flat)


def _constants(elements: Elements, node: ir.Node, place: int, name: str) -> list[int] | None:
    dims = _numbers(elements, node, place, name)
    numbers = None if dims is None else [d.value for d in dims]
    if numbers is None:
        return None
    if None in numbers:
        raise OpaqueError(f"the {name} aren't constant")
    return [n for n in numbers if n is not None]


def _axis(node: ir.Node, rank: int, default: int | None = None) -> int:
    axis = node.attributes.get("axis")
    number = axis.as_int() if axis is not None else default
    if number is None or not -rank <= number < rank:
        raise OpaqueError("the axis isn't known")
    return number % rank


# ---- moving elements


@rule("Identity Dropout")
def _same(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        raise OpaqueError("a Dropout that may train")
    return elements.at(node.inputs[0], indices)


@rule("Expand")
def _expand(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    return elements.operand(node, 0, indices)


@rule("Unsqueeze Squeeze")
def _ones(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    short, long = (0, 1) if node.op_type == "Unsqueeze" else (1, 0)
    sides = [_shape(elements, node.inputs[0]), _shape(elements, node.outputs[0])]
    rank = len(sides[long])
    axes = _constants(elements, node, 1, "axes")
    if axes is None:
        axes = [k for k, d in enumerate(sides[0]) if d == 1]
    ones = {axis % rank for axis in axes}
    if node.op_type == "Unsqueeze":
        return elements.at(node.inputs[0], tuple(i for k, i in enumerate(indices) if k not in ones))
    rest = iter(indices)
    if len(ones) + len(sides[short]) != rank:
        raise OpaqueError("the rank isn't known")
    return elements.at(node.inputs[0], tuple(Dim.of(0) if k in ones else next(rest) for k in range(rank)))


@rule("Transpose")
def _transpose(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    perm = node.attributes.get("perm")
    order = list(perm.as_ints()) if perm is not None else list(range(len(indices)))[::-1]
    source = [Dim.of(0)] * len(indices)
    for place, axis in enumerate(order):
        source[axis] = indices[place]
    return elements.at(node.inputs[0], tuple(source))


@rule("Reshape Flatten")
def _reshape(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    """Axes of 1 come and go; a run of axes is merged or split where its number of elements is provably the same."""
    before, after = _shape(elements, node.inputs[0]), _shape(elements, node.outputs[0])
    rest_in = [k for k, d in enumerate(before) if d != 1]
    rest_out = [k for k, d in enumerate(after) if d != 1]
    source = [Dim.of(0)] * len(before)
    while rest_in or rest_out:
        runs = _equal_run(before, after, rest_in, rest_out)
        differ = [(a, b) for a, b in zip(rest_in, rest_out, strict=False) if before[a] != after[b]]
        if runs is None and len(rest_in) == len(rest_out) and len(differ) == 1:
            runs = 1, 1  # the number of elements is the same, so this axis is too
        if runs is None:
            raise OpaqueError("the sizes around a Reshape aren't provably the same")
        taken_in, taken_out = rest_in[: runs[0]], rest_out[: runs[1]]
        rest_in, rest_out = rest_in[runs[0] :], rest_out[runs[1] :]
        place = Dim.of(0)
        for k in taken_out:
            place = place * after[k] + indices[k]
        for k in taken_in[:0:-1]:
            place, source[k] = _divided(elements, place, before[k])
        if taken_in:
            source[taken_in[0]] = place
    return elements.at(node.inputs[0], tuple(source))


def _equal_run(before: Shape, after: Shape, left: list[int], right: list[int]) -> tuple[int, int] | None:
    """How many of the axes `left` and `right` make the shortest pair of runs with equal products."""
    for length in range(2, len(left) + len(right) + 1):
        for n in range(max(1, length - len(right)), min(length, len(left) + 1)):
            a, b = Dim.of(1), Dim.of(1)
            for k in left[:n]:
                a = a * before[k]
            for k in right[: length - n]:
                b = b * after[k]
            if a == b:
                return n, length - n
    return None


def _divided(elements: Elements, place: Dim, size: Dim) -> tuple[Dim, Dim]:
    """Quotient and remainder of `place` by `size`, by what its terms say.

    An index that counts steps of another size, or steps of 1 up to another size, is taken to mean this one.
    """
    logic = elements.logic
    whole, rest = Dim.of(0), place
    for symbol in sorted(s for s in place.symbols() if s in logic.last):
        step = Dim(
            {tuple(s for s in m if s is not symbol): f for m, f in place.terms().items() if m.count(symbol) == 1}
        )
        index = Dim({(symbol,): 1})
        times = step.exact_div(size)
        if times is None and step.value is None:
            elements.assume(SameSize(step, size))
            times = Dim.of(1)
        if times is not None and times != 0:
            whole, rest = whole + index * times, rest - index * step
    if not logic.nonnegative(rest):
        raise OpaqueError("an index can't be split over the axes of a Reshape")
    if not logic.nonnegative(size - 1 - rest):
        counted = as_symbol(rest)
        lasts = () if counted is None else logic.last.get(counted, ())
        if not lasts:
            raise OpaqueError("an index can't be split over the axes of a Reshape")
        elements.assume(SameSize(lasts[0] + 1, size))
    return whole, rest


@rule("Slice")
def _slice(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    shape = _shape(elements, node.inputs[0])
    starts, ends = _numbers(elements, node, 1, "starts"), _numbers(elements, node, 2, "ends")
    axes, steps = _constants(elements, node, 3, "axes"), _constants(elements, node, 4, "steps")
    if starts is None or ends is None:
        raise OpaqueError("the starts aren't known")
    source = list(indices)
    for k, start in enumerate(starts):
        axis = (k if axes is None else axes[k]) % len(shape)
        step = 1 if steps is None else steps[k]
        if step < 0:
            # From the last element on where it starts beyond it.
            if not elements.logic.nonnegative(start - (shape[axis] - 1)) and start != -1:
                raise OpaqueError("a Slice goes backwards from the middle")
            start = shape[axis] - 1
        elif follows(-start - 1, elements.lasts(indices)):
            start = maximum(start + shape[axis], Dim.of(0))
        elif not elements.logic.nonnegative(start):
            raise OpaqueError("whether a Slice starts from the end isn't known")
        # A start beyond the end gives no elements, so that nothing is said of any.
        source[axis] = start + indices[axis] * step
    return elements.at(node.inputs[0], tuple(source))


@rule("Concat")
def _concat(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    axis = _axis(node, len(indices))
    before = Dim.of(0)
    pieces: list[tuple[Dim, Dim, ir.Value | None]] = []
    for value in node.inputs:
        size = _shape(elements, value)[axis]
        pieces.append((before, size, value))
        before = before + size
    result: Element | None = None
    for start, size, value in reversed(pieces):
        begun, within = elements.logic.ge(indices[axis] - start), elements.logic.ge(start + size - 1 - indices[axis])
        if FALSE in (begun, within):
            continue
        source = (*indices[:axis], indices[axis] - start, *indices[axis + 1 :])
        element = elements.at(value, source)
        # What lies before the first piece, or behind the last one, is never asked for.
        result = element if result is None else elements.numbers.choose(within, element, result)
        if begun == TRUE:
            break
    if result is None:
        raise OpaqueError("no piece of a Concat holds the index")
    return result


@rule("Gather")
def _gather(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    shape, picks = _shape(elements, node.inputs[0]), _shape(elements, node.inputs[1])
    axis = _axis(node, len(shape), 0)
    place = indices[axis : axis + len(picks)]
    index = _position(elements, elements.integer(node.inputs[1], place), shape[axis])
    return elements.at(node.inputs[0], (*indices[:axis], index, *indices[axis + len(picks) :]))


@rule("GatherElements")
def _gather_elements(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    shape = _shape(elements, node.inputs[0])
    axis = _axis(node, len(shape), 0)
    index = _position(elements, elements.integer(node.inputs[1], indices), shape[axis])
    return elements.at(node.inputs[0], (*indices[:axis], index, *indices[axis + 1 :]))


@rule("GatherND")
def _gather_nd(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    shape, picks = _shape(elements, node.inputs[0]), _shape(elements, node.inputs[1])
    batch, depth = attribute_int(node, "batch_dims", 0), picks[-1].value
    if batch is None or depth is None:
        raise OpaqueError("how many axes a GatherND indexes isn't known")
    place = indices[: len(picks) - 1]
    picked = [
        _position(elements, elements.integer(node.inputs[1], (*place, Dim.of(k))), shape[batch + k])
        for k in range(depth)
    ]
    return elements.at(node.inputs[0], (*indices[:batch], *picked, *indices[len(picks) - 1 :]))


def _position(elements: Elements, index: Dim, size: Dim) -> Dim:
    """`index` counted from the front."""
    if elements.logic.nonnegative(index):
        return index
    if not elements.logic.nonnegative(-index - 1):
        raise OpaqueError("whether an index counts from the end isn't known")
    return index + size


@rule("Tile")
def _tile(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    shape, whole = _shape(elements, node.inputs[0]), _shape(elements, node.outputs[0])
    if any(a != 1 and a != b for a, b in zip(shape, whole, strict=True)):
        raise OpaqueError("an axis is repeated")
    return elements.at(node.inputs[0], indices)


@rule("Trilu")
def _trilu(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    shift = elements.integer(node.inputs[1]) if len(node.inputs) > 1 and node.inputs[1] is not None else Dim.of(0)
    upper = attribute_int(node, "upper", 1)
    distance = indices[-1] - indices[-2] - shift
    kept = elements.logic.ge(distance if upper else -distance)
    element = elements.at(node.inputs[0], indices)
    if isinstance(element, Cases):
        zero = elements.numbers.number(FALSE, element.dtype)
        return elements.numbers.choose(kept, element, zero)
    return elements.logic.all_of([kept, element])


@rule("ScatterND")
def _scatter_nd(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    """An assignment to a block: every index is that of the update, shifted."""
    data, picks = _shape(elements, node.inputs[0]), _shape(elements, node.inputs[1])
    reduction = node.attributes.get("reduction")
    depth = picks[-1].value
    if depth is None or len(picks) - 1 != depth or (reduction is not None and reduction.as_string() != "none"):
        raise OpaqueError("a ScatterND that isn't an assignment to a block")
    source, inside = [], []
    place = tuple(elements.index(f"update{k}", picks[k]) for k in range(depth))
    for k in range(depth):
        shift = elements.integer(node.inputs[1], (*place, Dim.of(k))) - place[k]
        if any(s in elements.logic.last for s in shift.symbols()) or not elements.logic.nonnegative(shift):
            raise OpaqueError("a ScatterND that isn't an assignment to a block")
        source.append(indices[k] - shift)
        inside += [elements.logic.ge(source[k]), elements.logic.ge(picks[k] - 1 - source[k])]
    here = elements.logic.all_of(inside)
    update = elements.at(node.inputs[2], (*source, *indices[depth:]))
    if here == TRUE or len(data) != len(indices):
        return update
    return elements.numbers.choose(here, update, elements.at(node.inputs[0], indices))


# ---- making elements


@rule("ConstantOfShape")
def _constant_of_shape(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    attribute = node.attributes.get("value")
    if attribute is None:
        return elements.numbers.constant(ir.DataType.FLOAT, Poly(0.0))
    tensor = attribute.as_tensor()
    number = tensor.numpy().reshape(-1)[0]
    if tensor.dtype == ir.DataType.BOOL:
        return TRUE if number else FALSE
    if tensor.dtype.is_floating_point():
        return elements.numbers.constant(tensor.dtype, Poly.of(float(number)))
    return elements.numbers.constant(tensor.dtype, Dim.of(int(number)))


@rule("CumSum")
def _cumulative_sum(elements: Elements, node: ir.Node, indices: Indices) -> Element:
    """Of what doesn't depend on the index."""
    axis = elements.integer(node.inputs[1], tuple(Dim.of(0) for _ in _shape(elements, node.inputs[1]))).value
    if axis is None or any(attribute_int(node, name, 0) != 0 for name in ("exclusive", "reverse")):
        raise OpaqueError("a CumSum in another direction")
    axis %= len(indices)
    probe = elements.index("summed", _shape(elements, node.inputs[0])[axis])
    leaf = elements.integer(node.inputs[0], (*indices[:axis], probe, *indices[axis + 1 :]))
    if probe.symbols() & leaf.symbols():
        raise OpaqueError("a CumSum of what isn't constant")
    return elements.numbers.constant(elements.facts.dtype(node.outputs[0]), leaf * (indices[axis] + 1))
