"""An attention implementation for transformers that PyTorch exports as one operator, ai.onnx `Attention` of opset 23.

Grouped heads stay grouped, a cap and a scale are attributes, and the mask is the boolean one that the model makes once
for all its layers. What the operator doesn't have (attention sinks) is spelled out.
"""

from __future__ import annotations

from typing import Any

from graphopt.export.dependencies import require

NAME = "onnx_attention"
OPSET = 23
"""The first opset with the operator."""


def register() -> None:
    """Make the implementation known to transformers as `NAME`, with the boolean masks of its "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def usable(model_class: Any) -> tuple[str, ...]:
    """The implementations to trace models of a class with, the best first: ours where a registered one is called."""
    register()
    ours = [NAME] if getattr(model_class, "_supports_attention_backend", False) else []
    return (*ours, *(["sdpa"] if getattr(model_class, "_supports_sdpa", False) else []), "eager")


def attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    is_causal: bool | None = None,
    position_bias: Any = None,
    s_aux: Any = None,
    **_: Any,
) -> tuple[Any, None]:
    """softmax(cap(scaling · query keyᵀ) + bias + mask) value, with grouped heads.

    Args:
        module: The module that attends.
        query: [batch, heads, tokens, head size].
        key: [batch, key heads, all tokens, head size].
        value: [batch, key heads, all tokens, value size].
        attention_mask: Boolean, or numbers to add, to be broadcast to [batch, heads, tokens, all tokens]; None: none.
        scaling: Factor of the scores; None: 1 / √(head size).
        dropout: Not used.
        softcap: Scores are softcap · tanh(scores / softcap); None: as they are.
        is_causal: Mask later keys where there's no mask; None: as the module says.
        position_bias: Numbers to add to the scores, to be broadcast like the mask; None: none.
        s_aux: A score [heads] of each head that takes part in the softmax and has no value.

    Returns:
        [batch, tokens, heads, value size], and None in place of the weights.
    """
    torch = require("torch")
    scale = float(scaling if scaling is not None else query.shape[-1] ** -0.5)
    mask = attention_mask
    causal = False
    if mask is None and (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        # A single token sees every key.
        causal = not isinstance(query.shape[2], int) or query.shape[2] > 1
    # PyTorch takes the values' size for the queries' in the operator's result.
    spelled = s_aux is not None or query.shape[-1] != value.shape[-1]
    if position_bias is not None or spelled:
        mask, causal = _added(mask, causal, query, key, position_bias), False
    if spelled:
        return _spelled(query, key, value, mask, scale, softcap, s_aux), None
    result, *_ = torch.onnx.ops.attention(
        query, key, value, mask, is_causal=causal, scale=scale, softcap=float(softcap or 0.0)
    )
    return result.transpose(1, 2), None


def _added(mask: Any, causal: bool, query: Any, key: Any, bias: Any) -> Any:
    """Mask, causality and bias as numbers to add to the scores; None where there is none of them."""
    torch = require("torch")
    if causal:
        mask = torch.ones((query.shape[2], key.shape[2]), dtype=torch.bool, device=query.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        nothing = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, nothing, torch.full_like(nothing, torch.finfo(query.dtype).min))
    if mask is None or bias is None:
        return bias if mask is None else mask
    # Two lowest numbers added would be infinite, and a row of those has no softmax.
    return torch.clamp(mask + bias, min=torch.finfo(query.dtype).min)


def _spelled(query: Any, key: Any, value: Any, mask: Any, scale: float, cap: float | None, sinks: Any) -> Any:
    torch = require("torch")
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if cap:
        scores = torch.tanh(scores / cap) * cap
    if mask is not None:
        scores = scores + mask
    if sinks is None:
        return torch.matmul(torch.softmax(scores, -1), value).transpose(1, 2)
    sink = sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
    weights = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    return torch.matmul(weights, value).transpose(1, 2)
