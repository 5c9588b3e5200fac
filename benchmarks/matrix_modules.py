"""Small torch modules with forms of attention that the transformers library doesn't hold.

Importing this adds them to `matrix_models.MODELS`. Width 32, four heads of size 8 where there are heads.
"""

from __future__ import annotations

from typing import Any

import torch
from matrix_models import WIDTH, add
from torch import Tensor, nn
from torch.nn import functional

HEADS, SIZE = 4, WIDTH // 4


class Projected(nn.Module):
    """Projections of one input to heads and back; a subclass says what lies between."""

    groups = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, SIZE * self.groups), nn.Linear(WIDTH, SIZE * self.groups)

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, SIZE).transpose(1, 2)

    def joined(self, x: Tensor) -> Tensor:
        return self.o(x.transpose(1, 2).reshape(x.shape[0], -1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(self.attend(self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * SIZE**-0.5).softmax(-1) @ v


class Transposed(Projected):
    """The scores as k·qᵀ, so that the softmax runs over the second to last axis, and vᵀ stands at the left."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (v.transpose(-1, -2) @ (k @ q.transpose(-1, -2) * SIZE**-0.5).softmax(-2)).transpose(-1, -2)


class Einsum(nn.Module):
    """Projections and both products as einsum, the heads never moved before the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.empty(WIDTH, HEADS, SIZE)) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btc,chd->bthd", x, w) for w in self.weights[:3])
        scores = torch.einsum("bqhd,bkhd->bhqk", q * SIZE**-0.5, k)
        return torch.einsum("bthd,chd->btc", torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v), self.weights[3])


class ThreeDimensional(Projected):
    """Heads merged into the batch: products of rank 3 by torch.bmm."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch = q.shape[0]
        q, k, v = (x.reshape(batch * HEADS, -1, SIZE) for x in (q, k, v))
        scores = torch.baddbmm(torch.zeros(1), q, k.transpose(1, 2), beta=0, alpha=SIZE**-0.5)
        return torch.bmm(functional.softmax(scores, -1), v).view(batch, HEADS, -1, SIZE)


class Grouped(Projected):
    """Two heads of keys and values for four of queries, repeated as `how` says."""

    groups = 2

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def repeated(self, x: Tensor) -> Tensor:
        batch, _, tokens, size = x.shape
        if self.how == "interleave":
            return torch.repeat_interleave(x, 2, dim=1)
        if self.how == "gather":
            return x[:, torch.tensor([0, 0, 1, 1])]
        if self.how == "expand":
            return x[:, :, None].expand(batch, 2, 2, tokens, size).reshape(batch, HEADS, tokens, size)
        if self.how == "tile":
            return x.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2)
        return torch.stack([x, x], 2).flatten(1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().attend(q, self.repeated(k), self.repeated(v))


class GroupedProduct(Projected):
    """Grouped heads without repetition: a product of rank 5 that is broadcast over the group."""

    groups = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.unflatten(1, (2, 2))
        return super().attend(q, k.unsqueeze(2), v.unsqueeze(2)).flatten(1, 2)


class Guarded(Projected):
    """A boolean mask, and zeros for queries that may see nothing."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        scores = (q @ k.transpose(-1, -2) * SIZE**-0.5).masked_fill(~mask[:, None, None], float("-inf"))
        weights = scores.softmax(-1)
        return self.joined(torch.where(torch.isnan(weights), torch.zeros_like(weights), weights) @ v)


class Penalised(Projected):
    """An additive mask of -10000 made from the padding, added before the scale."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        added = (1.0 - mask[:, None, None].to(x.dtype)) * -10000.0
        return self.joined(((q @ k.transpose(-1, -2) + added) / SIZE**0.5).softmax(-1) @ v)


class Cached(Projected):
    """Causal by a triangle that is cut to size, as GPT-2 had it: `where(tril[:, :, t - s : t, :t], scores, -1e9)`."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("triangle", torch.ones(64, 64, dtype=torch.bool).tril().view(1, 1, 64, 64))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        scores = q @ k.transpose(-1, -2) * SIZE**-0.5
        seen = self.triangle[:, :, :tokens, :tokens]
        return torch.where(seen, scores, torch.full([], -1e9)).softmax(-1) @ v


class SquareRoots(Projected):
    """The scale as its fourth root on q and k each, the softmax in log space."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        root = SIZE**-0.25
        return functional.log_softmax((q * root) @ (k * root).transpose(-1, -2), -1).exp() @ v


class ByHand(Projected):
    """The softmax written out: exp(s - max) / sum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * SIZE**-0.5
        raised = torch.exp(scores - scores.amax(-1, keepdim=True))
        return raised / raised.sum(-1, keepdim=True) @ v


class Late(Projected):
    """The division by the sum after the product with v, as in flash attention."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.transpose(-1, -2) * SIZE**-0.5
        raised = torch.exp(scores - scores.amax(-1, keepdim=True))
        return raised @ v / raised.sum(-1, keepdim=True)


class Softplus(Projected):
    """Softplus attention: the exponential replaced by softplus, divided by the sum of the weights."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = functional.softplus(q @ k.transpose(-1, -2) * SIZE**-0.5)
        return weights / weights.sum(-1, keepdim=True) @ v


class Squared(Projected):
    """ReLU² attention, divided by the number of keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.relu(q @ k.transpose(-1, -2) * SIZE**-0.5).square() / k.shape[2] @ v


class Sigmoid(Projected):
    """Sigmoid attention with a bias."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.sigmoid(q @ k.transpose(-1, -2) * SIZE**-0.5 - 2.0) @ v


class Talking(Projected):
    """Talking heads: a linear map over the heads before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.before((q @ k.transpose(-1, -2) * SIZE**-0.5).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class Linear(Projected):
    """Linear attention: φ(q)·(φ(k)ᵀ·v) with φ = elu + 1, no score anywhere."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = functional.elu(q) + 1, functional.elu(k) + 1
        return q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(2, keepdim=True).transpose(-1, -2))


class Efficient(Projected):
    """Efficient attention: softmax of q over its features and of k over the tokens, then two products."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)


class SingleHead(nn.Module):
    """SHViT: one head on a part of the channels of an image, the rest passed by."""

    def __init__(self, keys: int = 16, part: int = 12) -> None:
        super().__init__()
        self.sizes = (keys, keys, part)
        self.norm, self.qkv = nn.GroupNorm(1, part), nn.Conv2d(part, 2 * keys + part, 1)
        self.project = nn.Sequential(nn.SiLU(), nn.Conv2d(WIDTH, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        keys, _, part = self.sizes
        taken, rest = torch.split(x, [part, WIDTH - part], 1)
        q, k, v = (y.flatten(2) for y in self.qkv(self.norm(taken)).split(self.sizes, 1))
        weights = (q.transpose(-2, -1) @ k * keys**-0.5).softmax(-1)
        mixed = (v @ weights.transpose(-2, -1)).reshape(taken.shape)
        return self.project(torch.cat([mixed, rest], 1))


class CrossCovariance(nn.Module):
    """EdgeNeXt: attention across channels, with a learnt temperature by head and q, k of length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.temperature = nn.Parameter(torch.ones(HEADS, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, HEADS, SIZE).permute(2, 0, 3, 4, 1)
        q, k = functional.normalize(q, dim=-1), functional.normalize(k, dim=-1)
        weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        return self.o((weights @ v).permute(0, 3, 1, 2).reshape(batch, tokens, width))


class Inverted(nn.Module):
    """iTransformer: the whole series of one variate is one token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(WIDTH, WIDTH), Projected(), nn.Linear(WIDTH, 6)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(1, keepdim=True)
        tokens = self.embed((x - mean).transpose(1, 2))
        return self.head(tokens + self.inner(tokens)).transpose(1, 2) + mean


class Decoupled(nn.Module):
    """MIP-Adapter: one q attends to text and to images by keys and values of their own, and the results are added."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
        self.kv = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor, text: Tensor, image: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.view(y.shape[0], -1, HEADS, SIZE).transpose(1, 2)

        q = heads(self.q(x))
        of_text = functional.scaled_dot_product_attention(q, heads(self.kv[0](text)), heads(self.kv[1](text)))
        of_image = functional.scaled_dot_product_attention(q, heads(self.kv[2](image)), heads(self.kv[3](image)))
        return self.o((of_text + 0.6 * of_image).transpose(1, 2).reshape(x.shape))


class Windows(nn.Module):
    """Attention in windows of 3 by 3 of an image, with a bias by relative position."""

    def __init__(self, side: int = 3) -> None:
        super().__init__()
        self.side, self.qkv, self.o = side, nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.bias = nn.Parameter(torch.empty(HEADS, side**2, side**2))

    def forward(self, x: Tensor) -> Tensor:
        batch, width, height, across = x.shape
        s = self.side
        y = x.view(batch, width, height // s, s, across // s, s).permute(0, 2, 4, 3, 5, 1).reshape(-1, s * s, width)
        q, k, v = self.qkv(y).view(-1, s * s, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((q * SIZE**-0.5) @ k.transpose(-2, -1) + self.bias).softmax(-1) @ v
        y = self.o(y.transpose(1, 2).reshape(-1, s * s, width)).view(batch, height // s, across // s, s, s, width)
        return y.permute(0, 5, 1, 3, 2, 4).reshape(batch, width, height, across)


class Pooled(nn.Module):
    """Pooling by attention: one learnt query, the same for every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.kv, self.o = (
            nn.Parameter(torch.empty(1, HEADS, 1, SIZE)),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).view(*x.shape[:2], 2, HEADS, SIZE).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(self.query.expand(x.shape[0], -1, -1, -1), k, v)
        return self.o(y.transpose(1, 2).reshape(x.shape[0], WIDTH))


class Library(nn.Module):
    """torch.nn.MultiheadAttention with a padding mask."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner(x, x, x, key_padding_mask=~mask, need_weights=False)[0]


class LibraryLayer(nn.Module):
    """torch.nn.TransformerEncoderLayer, tokens first, and the mean of the weights as a second output."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.transpose(0, 1)
        y, weights = self.inner(x, x, x, need_weights=True)
        return y.transpose(0, 1), weights


class Sdpa(Projected):
    """torch's operator with what `more` says."""

    def __init__(self, **more: Any) -> None:
        super().__init__()
        self.more = more

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, **self.more)


class SdpaMasked(Projected):
    """torch's operator with a boolean mask, under which a query may see nothing."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        both = mask[:, None, None] & mask[:, None, :, None]
        return self.joined(functional.scaled_dot_product_attention(q, k, v, attn_mask=both))


def _add(name: str, kind: str, sites: int, form: str, build: Any, **more: Any) -> None:
    add(f"torch:{name}", kind, sites, form, build, implementations=(), **more)


_add("plain", "sequence", 1, "q·kᵀ scaled, softmax, v", Projected)
_add("transposed", "sequence", 1, "vᵀ·softmax(k·qᵀ) over the rows", Transposed)
_add("einsum", "sequence", 1, "all products as einsum", Einsum)
_add("bmm", "sequence", 1, "heads in the batch, rank 3", ThreeDimensional)
for _how in ("interleave", "gather", "expand", "tile", "stack"):
    _add(f"grouped-{_how}", "sequence", 1, f"grouped heads by {_how}", lambda how=_how: Grouped(how))
_add("grouped-product", "sequence", 1, "grouped heads, a product of rank 5", GroupedProduct)
_add("nan-guard", "masked", 1, "zeros where a row is all masked", Guarded)
_add("penalty", "masked", 1, "-10000 added before the scale", Penalised)
_add("triangle", "sequence", 1, "causal by a buffer that is cut to size", Cached)
_add("square-roots", "sequence", 1, "fourth roots on q and k, log-softmax", SquareRoots)
_add("softmax-by-hand", "sequence", 1, "exp(s - max) / sum", ByHand)
_add("late-division", "sequence", 1, "divided after the product with v", Late)
_add("shvit", "map", 1, "single head on a channel split", SingleHead)
_add("edgenext", "sequence", 1, "attention across channels", CrossCovariance)
_add("itransformer", "series", 1, "inverted tokens", Inverted)
_add("mip-adapter", "conditioned", 2, "decoupled cross-attention, one q", Decoupled)
_add("windows", "map", 1, "windows of an image, bias by position", Windows)
_add("pooling", "sequence", 1, "one learnt query", Pooled)
_add("multihead", "masked", 1, "torch.nn.MultiheadAttention, padding mask", Library)
_add("multihead-weights", "sequence", 1, "torch.nn.MultiheadAttention that gives its weights", LibraryLayer)
_add("sdpa", "sequence", 1, "torch's operator", Sdpa)
_add("sdpa-causal", "sequence", 1, "torch's operator, causal", lambda: Sdpa(is_causal=True))
_add("sdpa-scale", "sequence", 1, "torch's operator with a scale", lambda: Sdpa(scale=0.3))
_add("sdpa-masked", "masked", 1, "torch's operator, rows all masked", SdpaMasked)
_add("softplus", "sequence", 0, "softplus attention", Softplus, others=1)
_add("relu-squared", "sequence", 0, "squared ReLU", Squared, others=1)
_add("sigmoid", "sequence", 0, "sigmoid attention", Sigmoid, others=1)
_add("talking-heads", "sequence", 0, "heads mixed before and after the softmax", Talking, others=1)
_add("linear", "sequence", 0, "linear attention: no product of q and k", Linear)
_add("efficient", "sequence", 0, "softmax of q and of k: no product of q and k", Efficient)
