"""CUDA cases of QuantizedKVAttention; the reference is its portable body."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from cuda_case import Call, Case
from cuda_references import aligned, of_body


@dataclasses.dataclass(frozen=True)
class Form:
    """Heads, features of a head, how keys and values are quantized, and how the operator attends."""

    heads: int = 4
    kv_heads: int = 2
    depth: int = 8
    key_bits: int = 8
    value_bits: int = 8
    per_channel: bool = True
    block: int = 8
    window: int = 5
    group: int = 0
    turned: int = 0
    at_read: bool = False
    interleaved: bool = False
    local: int = -1
    softcap: float = 0.0

    @property
    def attributes(self) -> dict[str, Any]:
        """Of the node."""
        return {
            "num_heads": self.heads, "kv_num_heads": self.kv_heads, "scale": self.depth**-0.5, "softcap": self.softcap,
            "local_window_size": self.local, "key_bits": self.key_bits, "value_bits": self.value_bits,
            "key_per_channel": int(self.per_channel), "block_size": self.block, "group_size": self.group,
            "window": self.window, "rotate_at_read": int(self.at_read), "rotary_interleaved": int(self.interleaved),
        }  # fmt: skip


MODELS = {
    "SmolLM2": Form(heads=9, kv_heads=3, depth=64, block=32, window=32, turned=32),
    "7B": Form(heads=32, kv_heads=8, depth=128, block=32, window=32, turned=64),
}
BITS = ((8, 8), (4, 4), (4, 2))
ODD = (
    Form(), Form(key_bits=4, value_bits=4, turned=4), Form(key_bits=3, value_bits=2, per_channel=False, group=4),
    Form(key_bits=2, value_bits=3, turned=3, at_read=True), Form(turned=4, interleaved=True, softcap=5.0),
    Form(heads=6, kv_heads=1, depth=12, key_bits=4, local=7, window=0), Form(per_channel=False, turned=2, at_read=True),
)  # fmt: skip
ROWS = (((9,), 9), ((14, 3), 1), ((30, 21), 5), ((40, 8, 17), 8))
"""Tokens of each row with the new ones, and how many of them are new."""


def attention(
    form: Form, totals: tuple[int, ...], fresh: int, kind: str, torch: Any, device: str, launchers: Any
) -> Call:
    from graphopt.runtime_ops.quantized_kv_attention import layout_of

    generator = torch.Generator().manual_seed(sum(totals) + fresh)
    dtype = torch.float16 if kind == "half" else torch.float32
    batch, layout = len(totals), layout_of(form.attributes, form.depth)
    shapes = layout.shapes(batch, max(totals))

    def random(*shape: int) -> Any:
        return torch.randn(*shape, generator=generator)

    heads = (form.heads, form.kv_heads, form.kv_heads)
    query, key, value = (random(batch, fresh, n * form.depth).to(dtype).to(device) for n in heads)
    codes = torch.randint(0, 256, shapes[0], generator=generator, dtype=torch.uint8).to(device)
    scales = (0.01 + 0.02 * torch.rand(*shapes[1], generator=generator)).half().to(device)
    recent = random(*shapes[2]).half().to(device)
    angles = torch.arange(max(totals))[:, None] * 100.0 ** (-torch.arange(form.turned) / max(form.turned, 1))
    cos, sin = angles.cos().contiguous().to(device), angles.sin().contiguous().to(device)
    output = torch.empty_like(query)
    on_host = torch.tensor(totals, dtype=torch.int32)
    sizes = {"totals": on_host, "batch": batch, "fresh": fresh, "heads": form.heads, "kv_heads": form.kv_heads,
             "depth": form.depth, "width": form.block, "window": form.window}  # fmt: skip
    scratch = aligned(torch, launchers.call("graphopt_cuda_quantized_kv_attention_scratch_bytes", sizes), device)
    # Past and present are one buffer, as in generation; what it held before is kept for the reference.
    inputs = [query, key, value, codes.clone(), scales.clone(), recent.clone(), on_host - 1, cos, sin]
    arguments = {
        "query": query, "key": key, "value": value, "past_codes": codes, "past_scales": scales, "past_recent": recent,
        "cos": cos, "sin": sin, "output": output, "codes": codes, "scales": scales, "recent": recent,
        "scratch": scratch, "past_blocks": codes.shape[1], "blocks": codes.shape[1],
        "group": form.group or form.depth, "key_bits": form.key_bits, "value_bits": form.value_bits,
        "turned": form.turned, "local": form.local, "per_channel": int(form.per_channel),
        "interleaved": int(form.interleaved), "at_read": int(form.at_read), "half": int(kind == "half"),
        "scale": form.attributes["scale"], "softcap": form.softcap, **sizes,
    }  # fmt: skip
    moved = sum(int(t.numel() * t.element_size()) for t in (query, key, value, output))
    return Call(
        arguments, [output, codes, scales, recent],
        lambda: of_body(torch, "QuantizedKVAttention", inputs, form.attributes),
        bytes=moved + sum(layout.bytes(total) for total in totals),
        operations=4 * form.heads * form.depth * fresh * sum(totals), arithmetic="float16 tensor", atol=2e-3,
        rtol=2e-3, steps=255, share=0.005,
    )  # fmt: skip


def cases() -> Iterator[Case]:
    """Decoding and prompts of real models; every form with rows of different lengths."""
    name = "graphopt_cuda_quantized_kv_attention"
    for (model, form), (keys, values), kind in itertools.product(MODELS.items(), BITS, ("float", "half")):
        chosen = dataclasses.replace(form, key_bits=keys, value_bits=values)
        for batch, past, fresh in ((1, 256, 1), (1, 1024, 1), (1, 4096, 1), (8, 4096, 1), (1, 0, 512)):
            shape = f"{model}, {batch} × {fresh} after {past}, K{keys}V{values}, {kind}"
            make = functools.partial(attention, chosen, (past + fresh,) * batch, fresh, kind)
            yield Case("QuantizedKVAttention", name, shape, make)
    for number, (form, (totals, fresh)) in enumerate(itertools.product(ODD, ROWS)):
        kind = ("float", "half")[number % 2]
        shape = f"{fresh} new of {totals}, {form}, {kind}"
        make = functools.partial(attention, form, totals, fresh, kind)
        yield Case("QuantizedKVAttention", name, shape, make, False)
