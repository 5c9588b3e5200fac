"""CUDA cases of QuantizedKVAttention, held against its portable body on the CPU."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import onnxruntime
from cuda_case import Call, Case

from graphopt.runtime_ops import operators
from graphopt.runtime_ops.operator import DOMAIN, add_body
from graphopt.runtime_ops.quantized_kv_attention import layout_of

NAME = "QuantizedKVAttention"
LAUNCHER = "graphopt_cuda_quantized_kv_attention"
ODD: tuple[dict[str, Any], ...] = (
    {},
    {"key_bits": 4, "value_bits": 3, "rotate_at_read": 1},
    {"key_bits": 3, "value_bits": 2, "key_per_channel": 0, "group_size": 8},
    {"key_bits": 2, "value_bits": 4, "rotary_interleaved": 1, "window": 0},
    {"softcap": 3.0, "local_window_size": 11, "num_heads": 40},
    {"rotate_at_read": 1, "rotary_interleaved": 1, "key_per_channel": 0, "num_heads": 2},
    {"shared": 1, "key_bits": 4, "window": 3},
    {"shared": 1, "rotate_at_read": 1, "local_window_size": 20},
)
"""Attributes of small nodes, beside those of `attributes`."""
RUNS = (([0, 0], 47, [47, 20]), ([47, 20], 1, [1, 1]), ([48, 21], 9, [9, 9]), ([3, 60], 1, [1, 1]))
"""Tokens of the past, new ones, and how many of those count; of two rows."""


def attributes(**given: Any) -> dict[str, Any]:
    """Those of a small node, but for those given."""
    small = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.25, "block_size": 8, "window": 5}
    return operators()[NAME].attributes_of(**(small | given))


def body(node: dict[str, Any], half: bool) -> onnxruntime.InferenceSession:
    """A session of the portable body."""
    operator = operators()[NAME]
    kinds = {"T": ir.DataType.FLOAT16 if half else ir.DataType.FLOAT}
    inputs, outputs = (
        [
            ir.Value(name=p.name, type=ir.TensorType(kinds.get(p.type) or ir.DataType[p.type.upper()]))
            for p in parameters
        ]
        for parameters in (operator.inputs, operator.outputs)
    )
    for value, parameter in zip(inputs, operator.inputs, strict=True):
        value.shape = ir.Shape([None] * (parameter.shape.count(",") + 1))
    made = [
        ir.AttrFloat32(key, value) if isinstance(value, float) else ir.AttrInt64(key, value)
        for key, value in node.items()
    ]
    graph = ir.Graph(
        inputs, outputs, nodes=[ir.Node(DOMAIN, NAME, inputs, attributes=made, outputs=outputs)],
        opset_imports={"": 21}, name="g",
    )  # fmt: skip
    model = ir.Model(graph, ir_version=10)
    add_body(model, NAME)
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])


def attention(
    node: dict[str, Any], depth: int, past: list[int], fresh: int, counted: list[int], half: bool, in_place: bool,
    torch: Any, device: str, launchers: Any,
) -> Call:  # fmt: skip
    heads, kv = node["num_heads"], node["kv_num_heads"]
    generator = torch.Generator().manual_seed(sum(past) + fresh)
    kind = torch.float16 if half else torch.float32
    batch, totals = len(past), [a + b for a, b in zip(past, counted, strict=True)]
    query, key, value = (
        torch.randn(batch, fresh, n * depth, generator=generator).to(kind).to(device) for n in (heads, kv, kv)
    )
    layout = layout_of(node, depth)
    in_place |= bool(node["shared"])
    code_shape, scale_shape, recent_shape = layout.shapes(batch, max(past) + (fresh if in_place else 0))
    codes = torch.randint(0, 256, code_shape, generator=generator, dtype=torch.uint8).to(device)
    scales = (torch.rand(scale_shape, generator=generator) * 0.02).half().to(device)
    recent = torch.randn(recent_shape, generator=generator).half().to(device)
    blocks = max([code_shape[1], *(max(t - node["window"], 0) // node["block_size"] for t in totals)])
    known = [codes, scales, recent]
    made = known if in_place else [
        torch.empty(batch, blocks, *code_shape[2:], dtype=torch.uint8, device=device),
        torch.empty(batch, blocks, *scale_shape[2:], dtype=torch.float16, device=device),
        torch.empty_like(recent),
    ]  # fmt: skip
    columns = 6 if depth < 32 else depth // 2
    angles = torch.arange(max(totals), dtype=torch.float64)[:, None] * 100.0 ** (-torch.arange(columns) / columns)
    cos, sin = angles.cos().float().to(device), angles.sin().float().to(device)
    lengths = torch.tensor(totals, dtype=torch.int32)
    sizes = [batch, fresh, heads, kv, depth, node["block_size"], node["window"]]
    scratch = torch.empty(
        max(launchers.call(f"{LAUNCHER}_scratch_bytes", [lengths, *sizes]), 1), dtype=torch.uint8, device=device
    )
    y = torch.empty_like(query)
    given = [query, key, value, *known, lengths - 1, cos, sin]

    def expected() -> list[Any]:
        feeds = {p.name: t.cpu().numpy() for p, t in zip(operators()[NAME].inputs, given, strict=True)}
        return [torch.from_numpy(array).to(device) for array in body(node, half).run(None, feeds)]

    cache = sum(layout.bytes(total) for total in totals)
    return Call(
        [
            query, key, value, *known, lengths, cos, sin, y, *made, scratch, batch, fresh, code_shape[1], blocks, heads,
            kv, depth, node["block_size"], node["window"], node["group_size"] or depth, node["key_bits"],
            node["value_bits"], columns, node["local_window_size"], node["key_per_channel"],
            node["rotary_interleaved"], node["rotate_at_read"], int(half), node["shared"], node["scale"],
            node["softcap"],
        ],
        # Of a shared cache nothing is written, and the body's present is nobody's.
        [y] if node["shared"] else [y, *made],
        (lambda: expected()[:1]) if node["shared"] else expected,
        bytes=cache + sum(t.numel() * t.element_size() for t in (query, key, value, y)),
        operations=sum(4 * heads * depth * (a * fresh + fresh * (fresh + 1) // 2) for a in past),
        atol=2e-3 if half else 2e-4,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Tokens after long pasts, prompts, and small nodes of every kind."""
    for bits, at_read, (batch, past, fresh) in (
        (bits, at_read, run)
        for bits in (8, 4, 3)
        for at_read in (0, 1)
        for run in ((1, 4096, 1), (16, 4096, 1), (1, 0, 512), (1, 4096, 128))
    ):
        node = attributes(
            num_heads=32, kv_num_heads=8, scale=128**-0.5, block_size=32, window=32, key_bits=bits, value_bits=bits,
            rotate_at_read=at_read,
        )  # fmt: skip
        shape = f"batch {batch}, {fresh} after {past}, {bits} bits{', rotated at read' * at_read}"
        made = functools.partial(attention, node, 128, [past] * batch, fresh, [fresh] * batch, True, fresh == 1)
        yield Case(NAME, LAUNCHER, shape, made)
    for given in ODD:
        for past, fresh, counted in RUNS:
            for half in (False, True):
                made = functools.partial(attention, attributes(**given), 16, past, fresh, counted, half, False)
                yield Case(NAME, LAUNCHER, f"{fresh} after {past}, {given}", made, False)
