"""Decoders of one or two layers made by hand, in every form of cache that a file may have."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx

HIDDEN, HEADS, KV_HEADS, SIZE, VOCABULARY = 64, 4, 2, 16, 41


def decoder(
    kind: Literal["group-query", "attention", "concat"] = "group-query",
    *,
    layers: int = 2,
    rotary: bool = True,
    positions: bool = False,
    names: str = "past_key_values.{}.{} present.{}.{}",
    dtype: str = "float",
    layout: Literal["BHSD", "BSHD"] = "BHSD",
) -> onnx.ModelProto:
    """A decoder with a mask over past and new tokens; no norms and no MLP, which a cache doesn't meet.

    Args:
        kind: What joins past and new: com.microsoft's GroupQueryAttention, ai.onnx's Attention, or Concat.
        layers: Layers.
        rotary: "group-query": rotate queries and keys inside the operator.
        positions: Add a table of positions, indexed by an input.
        names: Forms of the names of past and present.
        dtype: Element type of the whole model.
        layout: "concat": that of the cache.
    """
    rng = np.random.default_rng(0)
    past_name, present_name = names.split()
    shape = {"BHSD": "batch, 2, past, 16", "BSHD": "batch, past, 2, 16"}[layout]
    inputs = ["int64[batch, sequence] input_ids", "int64[batch, total] attention_mask"]
    inputs += ["int64[batch, sequence] position_ids"] * positions
    outputs = [f"{dtype}[batch, sequence, {VOCABULARY}] logits"]
    weights: dict[str, np.ndarray] = {
        "embedding": rng.normal(size=(VOCABULARY, HIDDEN)),
        "table": rng.normal(size=(64, HIDDEN)),
    }
    body = ["x0 = Gather(embedding, input_ids)"]
    if positions:
        body = ["e = Gather(embedding, input_ids)", "p = Gather(table, position_ids)", "x0 = Add(e, p)"]
    body += _mask(kind, dtype)
    kv = KV_HEADS * SIZE
    for i in range(layers):
        past = [past_name.format(i, part) for part in ("key", "value")]
        present = [present_name.format(i, part) for part in ("key", "value")]
        inputs += [f'{dtype}[{shape}] "{name}"' for name in past]
        outputs += [f'{dtype}[{shape.replace("past", "total")}] "{name}"' for name in present]
        for name, width in (("q", HIDDEN), ("k", kv), ("v", kv), ("o", HIDDEN)):
            weights[f"w{name}{i}"] = rng.normal(size=(HIDDEN, width)) * 0.15
        body += [f"{name}{i} = MatMul(x{i}, w{name}{i})" for name in "qkv"]
        body += _attention(kind, i, past, present, rotary, layout)
        body += [f"m{i} = MatMul(a{i}, wo{i})", f"x{i + 1} = Add(x{i}, m{i})"]
    body.append(f"logits = MatMul(x{layers}, head)")
    weights["head"] = rng.normal(size=(HIDDEN, VOCABULARY)) * 0.2
    # The text form of ONNX has no quoted names, so the names are put in afterwards.
    aliases: dict[str, str] = {}
    text = "\n".join(body)
    header = f"{', '.join(inputs)}) => ({', '.join(outputs)}"
    for i in range(layers):
        for part in ("key", "value"):
            for form in (past_name, present_name):
                name = form.format(i, part)
                aliases[f"cache_{len(aliases)}_"] = name
                alias = f"cache_{len(aliases) - 1}_"
                header, text = header.replace(f'"{name}"', alias), text.replace(f'"{name}"', alias)
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 23, "com.microsoft": 1]>\ng ({header}) {{\n{text}\n}}'
    )
    if kind == "group-query" and rotary:
        angles = np.arange(64)[:, None] * 10000.0 ** (-np.arange(SIZE // 2) / (SIZE / 2))
        weights |= {"cos": np.cos(angles), "sin": np.sin(angles)}
    numbers = {"float": np.float32, "float16": np.float16, "double": np.float64}[dtype]
    read = {name for node in model.graph.node for name in node.input}
    for name, array in weights.items():
        if name in read:
            model.graph.initializer.append(onnx.numpy_helper.from_array(array.astype(numbers), name))
    for value in (*model.graph.input, *model.graph.output):
        value.name = aliases.get(value.name, value.name)
    for node in model.graph.node:
        node.input[:] = [aliases.get(name, name) for name in node.input]
        node.output[:] = [aliases.get(name, name) for name in node.output]
    return model


def _mask(kind: str, dtype: str) -> list[str]:
    if kind == "group-query":
        return [
            "one = Constant<value_ints = [1]>()", "counts = ReduceSum<keepdims = 0>(attention_mask, one)",
            "unit = Constant<value_int = 1>()", "less = Sub(counts, unit)", "lengths = Cast<to = 6>(less)",
            "sizes = Shape(attention_mask)", "wide = Gather(sizes, unit)", "total_ = Cast<to = 6>(wide)",
        ]  # fmt: skip
    return [
        "unit = Constant<value_int = 1>()", "zero = Constant<value_int = 0>()", "sizes = Shape(attention_mask)",
        "wide = Gather(sizes, unit)", "places = Range(zero, wide, unit)", "ids = Shape(input_ids)",
        "new = Gather(ids, unit)", "before = Sub(wide, new)", "rows = Range(before, wide, unit)",
        "last = Constant<value_ints = [-1]>()", "column = Unsqueeze(rows, last)",
        "causal = LessOrEqual(places, column)", "kept = Cast<to = 9>(attention_mask)",
        "middle = Constant<value_ints = [1, 2]>()", "wider = Unsqueeze(kept, middle)", "allowed = And(causal, wider)",
        "low_ = Constant<value_float = -10000.0>()", "none_ = Constant<value_float = 0.0>()",
        f"low = Cast<to = {_TYPES[dtype]}>(low_)", f"none = Cast<to = {_TYPES[dtype]}>(none_)",
        "bias = Where(allowed, none, low)",
    ]  # fmt: skip


_TYPES = {"float": 1, "float16": 10, "double": 11}


def _attention(kind: str, i: int, past: list[str], present: list[str], rotary: bool, layout: str) -> list[str]:
    quoted = [f'"{name}"' for name in (*past, *present)]
    if kind == "group-query":
        tables = ", cos, sin" if rotary else ""
        return [
            f"a{i}, {quoted[2]}, {quoted[3]} = com.microsoft.GroupQueryAttention<num_heads = {HEADS}, "
            f"kv_num_heads = {KV_HEADS}, do_rotary = {int(rotary)}>"
            f"(q{i}, k{i}, v{i}, {quoted[0]}, {quoted[1]}, lengths, total_{tables})"
        ]
    if kind == "attention":
        return [
            f"a{i}, {quoted[2]}, {quoted[3]} = Attention<q_num_heads = {HEADS}, kv_num_heads = {KV_HEADS}>"
            f"(q{i}, k{i}, v{i}, bias, {quoted[0]}, {quoted[1]})"
        ]
    axis = 2 if layout == "BHSD" else 1
    lines = [
        f"qs{i} = Constant<value_ints = [0, 0, {HEADS}, {SIZE}]>()", f"ks{i} = Constant<value_ints = [0, 0, {KV_HEADS}, {SIZE}]>()",
        f"q4{i} = Reshape(q{i}, qs{i})", f"k4{i} = Reshape(k{i}, ks{i})", f"v4{i} = Reshape(v{i}, ks{i})",
        f"qt{i} = Transpose<perm = [0, 2, 1, 3]>(q4{i})",
    ]  # fmt: skip
    for name, old, now in (("k", quoted[0], quoted[2]), ("v", quoted[1], quoted[3])):
        if layout == "BHSD":
            lines += [
                f"{name}t{i} = Transpose<perm = [0, 2, 1, 3]>({name}4{i})",
                f"{now} = Concat<axis = {axis}>({old}, {name}t{i})",
            ]
            lines.append(f"{name}j{i} = Identity({now})")
        else:
            lines += [
                f"{now} = Concat<axis = {axis}>({old}, {name}4{i})",
                f"{name}j{i} = Transpose<perm = [0, 2, 1, 3]>({now})",
            ]
        lines += [
            f"{name}g{i} = Constant<value_ints = [2]>()", f"{name}u{i} = Unsqueeze({name}j{i}, {name}g{i})",
            f"{name}r{i} = Constant<value_ints = [1, 1, {HEADS // KV_HEADS}, 1, 1]>()", f"{name}e{i} = Tile({name}u{i}, {name}r{i})",
            f"{name}z{i} = Constant<value_ints = [0, {HEADS}, -1, {SIZE}]>()", f"{name}h{i} = Reshape({name}e{i}, {name}z{i})",
        ]  # fmt: skip
    return [
        *lines,
        f"kT{i} = Transpose<perm = [0, 1, 3, 2]>(kh{i})", f"raw{i} = MatMul(qt{i}, kT{i})",
        f"f{i} = Constant<value_float = {SIZE**-0.5}>()", f"fc{i} = CastLike(f{i}, raw{i})", f"scaled{i} = Mul(raw{i}, fc{i})",
        f"masked{i} = Add(scaled{i}, bias)", f"p{i} = Softmax(masked{i})", f"w{i} = MatMul(p{i}, vh{i})",
        f"wt{i} = Transpose<perm = [0, 2, 1, 3]>(w{i})", f"os{i} = Constant<value_ints = [0, 0, {HIDDEN}]>()", f"a{i} = Reshape(wt{i}, os{i})",
    ]  # fmt: skip
