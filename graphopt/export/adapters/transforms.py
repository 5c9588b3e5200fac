"""Adapters whose new weight is a function of the old one: W' = f(W), W [out, in] float32.

The kernels of a convolution are one row each: "in" is input channels times kernel positions. What inverts or
decomposes does so in float64.
"""

from __future__ import annotations

import re

import numpy as np

from graphopt.export.adapters.low_rank import lora, lora_scale
from graphopt.export.adapters.site import Array, Site, float64


def pissa(site: Site, weight: Array) -> Array:
    """PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models.

    W' = (W − Σᵢ<ᵣ σᵢ uᵢ vᵢᵀ) + (alpha/r) B A: the adapter began as the r largest singular triples of W.
    """
    b, a = lora(site)
    rank = a.shape[0]
    u, s, v = np.linalg.svd(float64(weight), full_matrices=False)
    return np.asarray(weight - ((u[:, :rank] * s[:rank]) @ v[:rank]).astype(np.float32) + b @ a)


def olora(site: Site, weight: Array) -> Array:
    """OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models: with W = Q R,
    W' = W + (alpha/r) (B A − Q[:, :r] R[:r]): the adapter began as the first r columns of Q and rows of R.
    """
    b, a = lora(site)
    rank = a.shape[0]
    q, r = np.linalg.qr(float64(weight))
    began = (q[:, :rank] @ r[:rank]) * lora_scale(site, rank)
    return np.asarray(weight - began.astype(np.float32) + b @ a)


def kasa(site: Site, weight: Array) -> Array:
    """KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models.

    W' = (W without its r smallest singular triples) + (alpha/r) B diag(d) A.
    """
    b, a = lora(site)
    rank = a.shape[0]
    u, s, v = np.linalg.svd(float64(weight), full_matrices=False)
    dropped = (u[:, -rank:] * s[-rank:]) @ v[-rank:]
    return np.asarray(weight - dropped.astype(np.float32) + (b * site.tensors["lora_diag"]) @ a)


def osf(site: Site, weight: Array) -> Array:
    """Sculpting Subspaces: Constrained Full Fine-Tuning in LLMs for Continual Learning (OSF).

    The largest singular triples of W stay as they are, the others are the adapter's: W' = U₀ S₀ V₀ + U diag(s) V.
    """
    u, s, v = (site.tensors[f"osf_svd_params.{n}_low"] for n in "USV")
    own, values, vectors = np.linalg.svd(float64(weight), full_matrices=False)
    kept = values.size - s.size
    before = (own[:, kept:] * values[kept:]) @ vectors[kept:]
    return np.asarray(weight - before.astype(np.float32) + (u * s) @ v)


def hira(site: Site, weight: Array) -> Array:
    """HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models: W' = W ⊙ (1 + B A)."""
    embedding = "hira_embedding_A" in site.tensors
    a, b = (site.flat(f"hira_embedding_{n}" if embedding else f"hira_{n}") for n in "AB")
    return np.asarray(weight + weight * (b @ a))


def glora(site: Site, weight: Array) -> Array:
    """One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning (GLoRA): W' = W + W ⊙ A + B."""
    return np.asarray(weight + weight * _glora_path(site, "A") + _glora_path(site, "B"))


def glora_bias(site: Site, bias: Array, weight: Array) -> Array:
    """GLoRA's bias: b' = b + b ⊙ D + E + W C, with the base weight W."""
    c, d, e = (_glora_path(site, name) for name in "CDE")
    return np.asarray(bias + bias * d + e + (weight @ c).reshape(-1))


def _glora_path(site: Site, name: str) -> Array:
    """One of the matrices: a product of two, a vector, a number, or zeros."""
    if (up := site.tensors.get(f"glora_{name}.Xu")) is not None:
        return np.asarray(site.tensors[f"glora_{name}.Xd"] @ up)
    found = site.tensors.get(f"glora_{name}.X", site.tensors.get(f"glora_{name}.zeros"))
    return np.zeros((), np.float32) if found is None else found


def deft(site: Site, weight: Array) -> Array:
    """peft's DEFT ("Decompositional Efficient Fine-Tuning for Text-to-Image Models"), and with `para` "PaRa:
    Personalizing Text-to-Image Diffusion via Parameter Rank Reduction".

    W' = W + Q (s R − Pᵀ W), with Q = P and relu(P) for P, or both the orthonormal factor of P; without R for PaRa.
    """
    p = site.tensors["deft_P"]
    if site.config.get("decomposition_method") == "qr":
        left = np.asarray(np.linalg.qr(float64(p))[0], np.float32)
        right = left
    else:
        left, right = p, np.maximum(p, 0)
    gained: Array = -(right.T @ weight)
    if not site.config.get("para"):
        alpha = site.config.get("alpha")
        gained = gained + site.tensors["deft_R"] * np.float32(float(alpha) / p.shape[1] if alpha else 1.0)
    return np.asarray(weight + left @ gained)


def ia3(site: Site, weight: Array) -> Array:
    """Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning ((IA)³).

    W' = diag(l) W, or W diag(l) where the module is one of the feed-forward modules: l is [out, 1] or [1, in].
    """
    scale = site.tensors["ia3_l"]
    if _scales_inputs(site):
        return np.asarray(weight * np.repeat(scale.reshape(-1), weight.shape[1] // scale.size))
    return np.asarray(weight * scale.reshape(-1, 1))


def ia3_bias(site: Site, bias: Array) -> Array:
    """The bias is scaled as the outputs are."""
    return bias if _scales_inputs(site) else np.asarray(bias * site.tensors["ia3_l"].reshape(-1))


def _scales_inputs(site: Site) -> bool:
    """Whether l belongs to the inputs: [1, in] of a matrix; of a convolution, where it is [1, n, 1, 1], by name."""
    shape = site.tensors["ia3_l"].shape
    if len(shape) == 2 and shape != (1, 1):
        return bool(shape[0] == 1)
    chosen = site.config.get("feedforward_modules") or ()
    if isinstance(chosen, str):
        return re.fullmatch(chosen, site.module) is not None
    return any(site.module.endswith(str(name)) for name in chosen)


def oft(site: Site, weight: Array) -> Array:
    """Controlling Text-to-Image Diffusion by Orthogonal Finetuning (OFT): W' = W Rᵀ, R of orthogonal blocks.

    Of an embedding [tokens, features] the features are turned: W' = W R.
    """
    embedding = "oft_embedding_R" in site.tensors
    blocks = _oft_rotations(site, site.tensors["oft_embedding_R" if embedding else "oft_R"])
    blocks = blocks.transpose(0, 2, 1) if not embedding else blocks
    return _turned(weight, blocks.astype(np.float32))


def boft(site: Site, weight: Array) -> Array:
    """Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization (BOFT): W' = diag(s) W (Mₙ … M₀)ᵀ.

    Mᵢ = Pᵢ diag(blocks) Pᵢᵀ with the i-th butterfly permutation Pᵢ; boft_R is [factors, blocks, b, b].
    """
    factors = float64(site.tensors["boft_R"])
    count, number, size, _ = factors.shape
    found = weight
    for i in range(count):
        blocks = _cayley(0.5 * (factors[i] - factors[i].transpose(0, 2, 1)))
        place = _butterfly(number * size, number // 2**i, size // 2) if count > 1 else np.arange(number * size)
        found = found[:, np.argsort(place)]
        found = _turned(found, blocks.transpose(0, 2, 1).astype(np.float32))[:, place]
    return np.asarray(found * site.tensors["boft_s"].reshape(-1, 1))


def _butterfly(length: int, blocks: int, half: int) -> Array:
    """In each of the blocks the pieces of length `half` with even numbers first, then those with odd numbers."""
    inside = np.arange(length // blocks).reshape(-1, half)
    order = np.concatenate([inside[0::2], inside[1::2]]).reshape(-1)
    return np.asarray((np.arange(blocks)[:, None] * order.size + order[None]).reshape(-1))


def _turned(weight: Array, blocks: Array) -> Array:
    """W times the block-diagonal matrix of `blocks` [n or 1, b, b]."""
    size = blocks.shape[-1]
    parts = weight.reshape(weight.shape[0], -1, size).transpose(1, 0, 2)
    return np.asarray(np.matmul(parts, blocks).transpose(1, 0, 2).reshape(weight.shape))


def hra(site: Site, weight: Array) -> Array:
    """Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation (HRA).

    W' = W Πᵢ (I − 2 uᵢ uᵢᵀ / ‖uᵢ‖²), and with `apply_GS` the uᵢ are made orthogonal first.
    """
    u = float64(site.tensors["hra_u"])
    if site.config.get("apply_GS"):
        # The signs of Q's columns don't matter, Q Qᵀ being even in each.
        q = np.linalg.qr(u)[0].astype(np.float32)
        return np.asarray(weight - 2 * (weight @ q) @ q.T)
    u = u / np.linalg.norm(u, axis=0)
    # The product is I − U T Uᵀ with an upper triangular T ("The WY Representation for Products of Householder
    # Matrices"), so that W is gone over once and not once for each reflection.
    middle = np.zeros((u.shape[1], u.shape[1]))
    for i in range(u.shape[1]):
        middle[:i, i] = -2 * middle[:i, :i] @ (u[:, :i].T @ u[:, i])
        middle[i, i] = 2
    return np.asarray(weight - (weight @ u.astype(np.float32)) @ (middle @ u.T).astype(np.float32))


def bat(site: Site, weight: Array) -> Array:
    """Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large Language Models ("bat").

    Each r × r block of W is W' = W + W D + D, with one D for each row of blocks: [out/r, r, r].
    """
    block = site.tensors["miss_block"]
    rank = block.shape[-1]
    parts = weight.reshape(-1, rank, weight.shape[1] // rank, rank).transpose(2, 0, 1, 3)
    added = parts @ block + block
    return np.asarray(weight + added.transpose(1, 2, 0, 3).reshape(weight.shape))


def road(site: Site, weight: Array) -> Array:
    """3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability (RoAd).

    W' = R W, where R turns and scales pairs of outputs, each output with the one half a group away.
    """
    first, second = _road_columns(site)
    half = int(site.config["group_size"]) // 2
    pairs = weight.reshape(-1, 2, half, *weight.shape[1:])
    turned = np.stack([-pairs[:, 1], pairs[:, 0]], axis=1).reshape(weight.shape)
    shape = (-1, *[1] * (weight.ndim - 1))
    return np.asarray(first.reshape(shape) * weight + second.reshape(shape) * turned)


def _road_columns(site: Site) -> tuple[Array, Array]:
    """α cos θ and α sin θ of each output; by variant they are shared by a pair, or θ and α differ for the two."""
    theta, alpha = site.tensors["road_theta"], site.tensors["road_alpha"]
    group = int(site.config["group_size"])
    variant = site.config["variant"]
    if variant == "road_4":
        t, a = theta.reshape(-1, 2, group), alpha.reshape(-1, 2, group)
        return (a[:, 0] * np.cos(t[:, 0])).reshape(-1), (a[:, 1] * np.sin(t[:, 1])).reshape(-1)
    if variant == "road_1":
        theta, alpha = (np.repeat(x.reshape(-1, group // 2), 2, axis=0).reshape(-1) for x in (theta, alpha))
    return alpha * np.cos(theta), alpha * np.sin(theta)


def trainable_tokens(indices: Array, rows: Array, weight: Array) -> Array:
    """Some rows of an embedding are replaced by the adapter's."""
    found = weight.copy()
    found[indices] = rows
    return found


def _oft_rotations(site: Site, stored: Array) -> Array:
    """The blocks R [n, b, b] (float64), n = 1 where all share one.

    R = (I − Q)(I + Q)⁻¹ of skew-symmetric blocks Q, or what peft takes for it by default: the first terms of
    I − 2Q + 2Q² − …, with the sign of Q turned. With `coft` ("constrained") the norm
    of Q is held below eps/√n.
    """
    packed = float64(stored)
    size = (1 + round((1 + 8 * packed.shape[1]) ** 0.5)) // 2
    skew = np.zeros((packed.shape[0], size, size))
    rows, columns = np.triu_indices(size, 1)
    skew[:, rows, columns] = packed
    skew -= skew.transpose(0, 2, 1)
    if site.config.get("coft"):
        limit = float(site.config.get("eps", 6e-5)) / skew.shape[0] ** 0.5
        norm = np.sqrt((skew**2).sum((1, 2), keepdims=True))
        skew = np.where(norm <= limit, skew, limit * skew / np.maximum(norm, np.finfo(np.float64).tiny))
    one = np.eye(size)
    if not site.config.get("use_cayley_neumann", True):
        return _cayley(skew)
    terms = int(site.config.get("num_cayley_neumann_terms", 5))
    found = np.broadcast_to(one, skew.shape).copy()
    if terms > 1:
        found += 2 * skew
    if terms > 2:
        power = skew @ skew
        found += 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            found += 2 * power
        found += power @ skew
    return found


def _cayley(skew: Array) -> Array:
    """(I − S)(I + S)⁻¹ of a batch of skew-symmetric matrices, which is orthogonal; float64."""
    one = np.eye(skew.shape[-1])
    # X (I + S) = I − S, transposed for `solve`, which has the unknown on the right.
    turned = np.linalg.solve((one + skew).transpose(0, 2, 1), (one - skew).transpose(0, 2, 1))
    return np.asarray(turned.transpose(0, 2, 1))
