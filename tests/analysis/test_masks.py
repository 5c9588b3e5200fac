"""Masks as functions of batch, head, row and column: text graphs, and random compositions against their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from exactness import parse, reference_outputs
from hypothesis import given, settings
from hypothesis import strategies as st
from mask_values import assert_form

from graphopt.analysis.masks import MaskForm, Masks, NoForm
from graphopt.analysis.shapes import lazily

HEAD = '<ir_version: 10, opset_import: ["": 21]>'
INPUTS = "int64[B, S] ids, int64[B, T] attention_mask, float[B, 2, P, 4] past"
LENGTHS = """
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    first = Constant <value = int64[1] {0}> ()
    second = Constant <value = int64[1] {1}> ()
    s_shape = Shape <start = 1, end = 2> (ids)
    p_shape = Shape <start = 2, end = 3> (past)
    s = Squeeze(s_shape)
    p = Squeeze(p_shape)
    t = Add(p, s)
    rows = Range(zero, s, one)
    columns = Range(zero, t, one)
    positions = Add(rows, p)
    i = Unsqueeze(positions, second)
    j = Unsqueeze(columns, first)
"""
PADDED = """
    b_axes = Constant <value = int64[2] {1, 2}> ()
    kept = Cast <to = 9> (attention_mask)
    pad = Unsqueeze(kept, b_axes)
"""
SIZES = {"B": 2, "S": 4, "T": 7, "P": 3}


def graph(body: str, output: str = "bool[a, b, c, d] mask", inputs: str = INPUTS) -> ir.Model:
    return parse(f"{HEAD} g ({inputs}) => ({output}) {{ {LENGTHS} {body} }}")


def feeds(model: ir.Model, seed: int = 0, sizes: Mapping[str, int] = SIZES) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        shape = [d if isinstance(d, int) else sizes[str(d)] for d in value.shape or ()]
        kind = value.dtype.numpy()
        numbers = rng.normal(size=shape) if kind.kind == "f" and value.name != "m" else rng.integers(0, 2, size=shape)
        found[value.name] = numbers.astype(kind)
    return found


def form_of(model: ir.Model, name: str = "mask", sizes: bool = False) -> MaskForm | NoForm:
    """The form of the value `name`, after its numbers were compared with those of a run.

    With `sizes` the rows and columns are said to be S and P + S.
    """
    facts = lazily(model)
    masks = Masks(facts)
    value = next(v for n in model.graph for v in n.outputs if v.name == name)
    ids, past = facts.shape(model.graph.inputs[0]), facts.shape(model.graph.inputs[2])
    assert ids is not None
    assert past is not None
    form = masks.form(value, ids[1], ids[1] + past[2]) if sizes else masks.form(value)
    if isinstance(form, MaskForm):
        proto = ir.to_proto(model)
        names = [v.name for n in model.graph for v in n.outputs if v.name]
        del proto.graph.output[:]
        proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names)
        for seed in range(2):
            arrays = feeds(model, seed)
            results = reference_outputs(ir.from_proto(proto), arrays)
            if any(not np.isin(arrays.get(v.name or "", 0), (0, 1)).all() for v in form.binary):
                continue  # the form says nothing of this run
            assert_form(form, masks.elements, {**arrays, **dict(zip(names, results, strict=True))})
    return form


def understood(model: ir.Model, name: str = "mask", sizes: bool = False) -> MaskForm:
    form = form_of(model, name, sizes)
    assert isinstance(form, MaskForm), form
    return form


def test_causal_with_past_and_padding() -> None:
    form = understood(graph(f"{PADDED} seen = LessOrEqual(j, i) mask = And(seen, pad)"))
    assert form.describe().startswith("causal, padding from 'attention_mask'")
    assert form.causal
    assert form.from_past
    assert form.boolean
    assert form.shift == 0
    assert form.padding is not None
    assert form.padding.name == "attention_mask"
    assert [sorted(map(repr, pair)) for pair in form.equalities] == [["attention_mask[1]", "ids[1] + past[2]"]]
    assert not form.row_never_empty


@pytest.mark.parametrize(
    "text",
    [
        "mask = LessOrEqual(j, i)",
        "mask = GreaterOrEqual(i, j)",
        "hidden = Greater(j, i) mask = Not(hidden)",
        "hidden = Less(i, j) mask = Not(hidden)",
        "d = Sub(i, j) mask = GreaterOrEqual(d, zero)",
        "after = Add(i, one) mask = Less(j, after)",
        "d = Sub(j, i) c = Max(d, zero) mask = Equal(c, zero)",
        "always = GreaterOrEqual(j, zero) seen = LessOrEqual(j, i) mask = And(seen, always)",
        "seen = LessOrEqual(j, i) never = Greater(j, t) mask = Or(seen, never)",
        "seen = LessOrEqual(j, i) n = Cast <to = 1> (seen) mask = Cast <to = 9> (n)",
        "u = Unsqueeze(t, first) size = Concat <axis = 0> (s_shape, u) all = Expand(j, size) mask = LessOrEqual(all, i)",
    ],
)
def test_spellings_of_causal(text: str) -> None:
    form = understood(graph(text, "bool[c, d] mask"))
    assert form.describe() == "causal"
    assert form.from_past
    assert form.row_never_empty
    assert not form.assumptions


def test_triangle_of_the_lowest_number_times_what_is_beyond_the_positions() -> None:
    """As transformers 4.40 to 4.49 make it."""
    form = understood(graph("""
        t1 = Unsqueeze(t, first)
        size = Concat <axis = 0> (s_shape, t1)
        full = ConstantOfShape <value = float[1] {-3.4028235e38}> (size)
        upper = Trilu <upper = 1> (full, one)
        beyond = Greater(j, i)
        factor = Cast <to = 1> (beyond)
        mask = Mul(upper, factor)
    """, "float[c, d] mask"))  # fmt: skip
    assert form.describe() == "causal"
    assert form.from_past
    assert not form.boolean
    assert form.masked_values == (pytest.approx(-3.4028235e38),)


def test_padding_written_into_a_causal_mask() -> None:
    """masked_fill where the causal mask and the padding are both 0, then an in-place assignment left out."""
    form = understood(graph("""
        low = Constant <value = float {-3.4028235e38}> ()
        nought = Constant <value = float {0}> ()
        seen = LessOrEqual(j, i)
        causal = Where(seen, nought, low)
        axes = Constant <value = int64[2] {1, 2}> ()
        m = Cast <to = 1> (attention_mask)
        m4 = Unsqueeze(m, axes)
        sum = Add(causal, m4)
        hidden = Equal(sum, nought)
        mask = Where(hidden, low, causal)
    """, "float[a, b, c, d] mask"))  # fmt: skip
    assert form.describe() == "causal, padding from 'attention_mask'"
    assert not form.binary


@pytest.mark.parametrize("low", ["-10000", "-3.4028235e38", "-inf"])
def test_one_minus_the_mask_times_a_low_number(low: str) -> None:
    if low == "-inf":
        model = graph(
            """axes = Constant <value = int64[2] {1, 2}> ()
            m = Cast <to = 1> (attention_mask) m4 = Unsqueeze(m, axes) mask = Log(m4)""",
            "float[a, b, c, d] mask",
        )
    else:
        model = graph(f"""axes = Constant <value = int64[2] {{1, 2}}> ()
            lowest = Constant <value = float {{{low}}}> () unit = Constant <value = float {{1}}> ()
            m = Cast <to = 1> (attention_mask) m4 = Unsqueeze(m, axes)
            inverted = Sub(unit, m4) mask = Mul(inverted, lowest)""", "float[a, b, c, d] mask")  # fmt: skip
    form = understood(model)
    assert form.padding is not None
    assert form.padding.name == "attention_mask"
    assert form.masked_value == pytest.approx(float(low))
    assert [v.name for v in form.binary] == ["attention_mask"]
    assert form.describe() == "padding from 'attention_mask', if 'attention_mask' is 0 or 1"


def test_two_masks_added() -> None:
    form = understood(graph(f"""{PADDED}
        low = Constant <value = float {{-3.4028235e38}}> ()
        nought = Constant <value = float {{0}}> ()
        seen = LessOrEqual(j, i)
        a = Where(seen, nought, low)
        b = Where(pad, nought, low)
        mask = Add(a, b)
    """, "float[a, b, c, d] mask"))  # fmt: skip
    assert form.describe() == "causal, padding from 'attention_mask'"
    assert form.masked_values == (pytest.approx(-3.4028235e38), -np.inf)


def test_a_window() -> None:
    form = understood(graph("""
        w = Constant <value = int64 {3}> ()
        seen = LessOrEqual(j, i)
        start = Sub(i, w)
        near = Greater(j, start)
        mask = And(seen, near)
    """, "bool[c, d] mask"))  # fmt: skip
    assert form.describe() == "causal, window 3"
    assert form.window == 3
    assert form.row_never_empty


def test_padding_read_by_indices() -> None:
    """As torch.export writes an index [b, k] of the mask."""
    form = understood(graph("""
        b_shape = Shape <start = 0, end = 1> (ids)
        n = Squeeze(b_shape)
        batch = Range(zero, n, one)
        three = Constant <value = int64[3] {1, 2, 3}> ()
        front = Constant <value = int64[3] {0, 1, 2}> ()
        b4 = Unsqueeze(batch, three)
        j4 = Unsqueeze(columns, front)
        whole = Max(b4, j4)
        size = Shape(whole)
        bw = Expand(b4, size)
        jw = Expand(j4, size)
        last = Constant <value = int64[1] {-1}> ()
        bu = Unsqueeze(bw, last)
        ju = Unsqueeze(jw, last)
        place = Concat <axis = -1> (bu, ju)
        kept = Cast <to = 9> (attention_mask)
        pad = GatherND(kept, place)
        seen = LessOrEqual(j, i)
        mask = And(seen, pad)
    """))  # fmt: skip
    assert form.describe() == "causal, padding from 'attention_mask'"
    assert not form.assumptions


def test_padding_read_from_a_flattened_mask() -> None:
    form = understood(graph("""
        m_shape = Shape(attention_mask)
        t_shape = Shape <start = 1, end = 2> (attention_mask)
        length = Squeeze(t_shape)
        b_shape = Shape <start = 0, end = 1> (attention_mask)
        n = Squeeze(b_shape)
        batch = Range(zero, n, one)
        keys = Range(zero, length, one)
        three = Constant <value = int64[3] {1, 2, 3}> ()
        b4 = Unsqueeze(batch, three)
        steps = Mul(b4, length)
        place = Add(steps, keys)
        all = Constant <value = int64[1] {-1}> ()
        flat = Reshape(attention_mask, all)
        found = Gather(flat, place)
        mask = Cast <to = 9> (found)
    """))  # fmt: skip
    assert form.describe() == "padding from 'attention_mask'"
    assert not form.assumptions


def test_a_constant_triangle_sliced() -> None:
    """As GPT-2's buffer."""
    model = graph("""
        size = Constant <value = int64[2] {16, 16}> ()
        ones = ConstantOfShape <value = float[1] {1}> (size)
        lower = Trilu <upper = 0> (ones)
        bias = Cast <to = 9> (lower)
        t1 = Unsqueeze(t, first)
        some = Slice(bias, p_shape, t1, first)
        none = Constant <value = int64[1] {0}> ()
        mask = Slice(some, none, t1, second)
    """, "bool[c, d] mask")  # fmt: skip
    assert understood(model, sizes=True).describe() == "causal"
    folded = np.tril(np.ones((16, 16), dtype=bool))
    value = next(v for n in model.graph for v in n.outputs if v.name == "bias")
    constant = ir.Value(name="buffer", const_value=ir.tensor(folded, name="buffer"))
    model.graph.register_initializer(constant)
    ir.convenience.replace_all_uses_with(value, constant)
    form = understood(model, sizes=True)
    assert form.describe() == "causal"
    assert form.from_past


def test_alibi() -> None:
    form = understood(graph("""
        slopes = Constant <value = float[2] {0.5, 0.25}> ()
        axes = Constant <value = int64[2] {1, 2}> ()
        front = Constant <value = int64[2] {0, 1}> ()
        of_head = Unsqueeze(slopes, axes)
        last = Sub(t, one)
        back = Sub(columns, last)
        distance = Cast <to = 1> (back)
        bias = Mul(distance, of_head)
        low = Constant <value = float {-3.4028235e38}> ()
        seen = LessOrEqual(j, i)
        nought = Constant <value = float {0}> ()
        causal = Where(seen, nought, low)
        mask = Add(bias, causal)
    """, "float[b, c, d] mask"))  # fmt: skip
    assert form.describe() == "causal, ALiBi of 2 heads"
    assert form.from_past
    assert form.alibi is not None
    assert form.alibi.tolist() == [0.5, 0.25]
    assert form.bias is not None
    assert form.bias.name == "bias"


def test_a_bias_beside_a_masked_value() -> None:
    form = understood(graph("""
        low = Constant <value = float {-3.4028235e38}> ()
        seen = LessOrEqual(j, i)
        mask = Where(seen, relative, low)
    """, "float[a, b, c, d] mask", INPUTS + ", float[1, 2, S, T] relative"))  # fmt: skip
    assert form.causal
    assert form.bias is not None
    assert form.bias.name == "relative"
    assert form.alibi is None


def test_positions_from_an_input() -> None:
    form = understood(graph(
        "at = Unsqueeze(cache_position, second) mask = LessOrEqual(j, at)", "bool[c, d] mask",
        INPUTS + ", int64[S] cache_position",
    ))  # fmt: skip
    assert form.positions is not None
    assert form.positions.name == "cache_position"
    assert not form.causal


def test_what_isnt_understood_is_other() -> None:
    form = understood(graph("""
        seen = LessOrEqual(j, i)
        odd = Constant <value = int64 {2}> ()
        rest = Mod(j, odd)
        even = Equal(rest, zero)
        mask = And(seen, even)
    """, "bool[c, d] mask"))  # fmt: skip
    assert form.causal
    assert len(form.other) == 1
    assert form.obstacles == ("'rest': Mod isn't followed",)
    assert not form.row_never_empty


def test_an_overridable_constant_is_no_constant() -> None:
    model = graph(
        "seen = LessOrEqual(j, i) mask = And(seen, flag)", "bool[c, d] mask", INPUTS + ", bool[1] flag"
    )  # fmt: skip
    flag = model.graph.inputs[-1]
    flag.const_value = ir.tensor(np.array([True]), name="flag")
    model.graph.register_initializer(flag)
    assert len(understood(model).other) == 1


@pytest.mark.parametrize(
    ("text", "inputs"),
    [
        ("c = Max(relative, low) mask = Greater(c, nought)", ", float[1, 2, S, T] relative"),
        ("c = Cast <to = 7> (relative) mask = Equal(c, zero)", ", float[1, 2, S, T] relative"),
        ("o = Cast <to = 2> (one) c = Sub(small, o) mask = Cast <to = 9> (c)", ", uint8[1, 2, S, T] small"),
        ("c = Cast <to = 3> (wide) mask = Cast <to = 9> (c)", ", int64[1, 2, S, T] wide"),
    ],
)
def test_floats_are_no_integers_and_small_integers_wrap(text: str, inputs: str) -> None:
    constants = "low = Constant <value = float {-1}> () nought = Constant <value = float {0}> ()"
    form = understood(graph(f"{constants} {text}", "bool[a, b, c, d] mask", INPUTS + inputs))
    assert form.obstacles
    assert len(form.other) == 1


def test_everything_masked_is_no_form() -> None:
    form = form_of(graph("""
        low = Constant <value = float {-3.4028235e38}> ()
        t1 = Unsqueeze(t, first)
        size = Concat <axis = 0> (s_shape, t1)
        mask = Expand(low, size)
    """, "float[c, d] mask"))  # fmt: skip
    assert isinstance(form, NoForm)
    assert form.reason == "it masks everything"


def test_equal_forms_of_equal_masks() -> None:
    model = graph("""
        seen = LessOrEqual(j, i)
        hidden = Greater(j, i)
        mask = Not(hidden)
    """, "bool[c, d] mask")  # fmt: skip
    masks = Masks(lazily(model))
    named = {v.name: v for n in model.graph for v in n.outputs}
    a, b = masks.form(named["mask"]), masks.form(named["seen"])
    assert isinstance(a, MaskForm)
    assert isinstance(b, MaskForm)
    assert a.key == b.key


# ---- random compositions


@st.composite
def compositions(draw: st.DrawFn) -> str:
    """A random graph of mask operators, of integers, booleans and floats of shape [.., S, T]."""
    lines: list[str] = []
    ints, bools, floats = ["i", "j"], ["pad"], ["nought", "low", "half", "relative"]
    count = 0

    def add(kind: list[str], text: str) -> None:
        nonlocal count
        kind.append(f"v{count}")
        lines.append(f"v{count} = {text}")
        count += 1

    pick: Callable[[list[str]], str] = lambda kind: draw(st.sampled_from(kind))  # noqa: E731
    add(bools, "LessOrEqual(j, i)")
    for _ in range(draw(st.integers(1, 7))):
        match draw(st.integers(0, 13)):
            case 0:
                add(
                    ints,
                    f"{draw(st.sampled_from(['Add', 'Sub', 'Max', 'Min']))}({pick(ints)}, {pick([*ints, 'one', 'p', 's'])})",
                )
            case 1 | 2:
                op = draw(st.sampled_from(["Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"]))
                add(bools, f"{op}({pick(ints)}, {pick([*ints, 'one', 'zero', 'two'])})")
            case 3 | 4:
                add(bools, f"{draw(st.sampled_from(['And', 'Or', 'Xor']))}({pick(bools)}, {pick(bools)})")
            case 5:
                add(bools, f"Not({pick(bools)})")
            case 6 | 7:
                add(floats, f"Where({pick(bools)}, {pick(floats)}, {pick(floats)})")
            case 8:
                add(floats, f"{draw(st.sampled_from(['Add', 'Max', 'Min']))}({pick(floats)}, {pick(floats)})")
            case 9:
                add(floats, f"Cast <to = 1> ({pick([*bools, *ints])})")
            case 10:
                add(bools, f"Cast <to = 9> ({pick([*ints, *floats])})")
            case 11:
                add(floats, f"Mul({pick(floats)}, {pick(floats)})")
            case 12:
                add(ints, f"Cast <to = 7> ({pick(bools)})")
            case 13:
                add(floats, f"Sub(unit, {pick(floats)})")
    kind = draw(st.sampled_from(["bool", "float"]))
    if kind == "bool":
        lines.append(f"mask = And({bools[-1]}, {draw(st.sampled_from(bools))})")
    else:
        lines.append(f"mask = Add({floats[-1]}, {draw(st.sampled_from(floats))})")
    return f"{kind}|" + " ".join(lines)


@settings(max_examples=80, deadline=None)
@given(compositions())
def test_forms_of_random_compositions_are_true(text: str) -> None:
    kind, body = text.split("|")
    model = parse(f"""{HEAD} g ({INPUTS}, float[1, 1, S, T] relative) => ({kind}[a, b, c, d] out) {{ {LENGTHS} {PADDED}
        two = Constant <value = int64 {{2}}> ()
        nought = Constant <value = float {{0}}> ()
        low = Constant <value = float {{-3.4028235e38}}> ()
        half = Constant <value = float {{0.5}}> ()
        unit = Constant <value = float {{1}}> ()
        {body}
        wide = And(pad, pad)
        out = Where(wide, mask, mask)
    }}""")  # fmt: skip
    form_of(model)
