"""Adapters that add a product of two matrices: ΔW = B A, with B [out, r], A [r, in], the scale in B.

These can be merged, or kept beside the base weight: y = x Wᵀ + (x Aᵀ) Bᵀ.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from graphopt.export.adapters.site import Array, Site

Factors = tuple[Array, Array]
"""B [out, r] and A [r, in]."""


def lora_scale(site: Site, rank: int) -> float:
    """alpha/r, or alpha/√r for "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (rsLoRA)."""
    alpha = float(site.setting("alpha_pattern", "lora_alpha"))
    return alpha / math.sqrt(rank) if site.config.get("use_rslora") else alpha / rank


def lora(site: Site) -> Factors:
    """LoRA: Low-Rank Adaptation of Large Language Models: ΔW = (alpha/r) B A.

    The kernel of a convolution lies in A, [r, in, height, width], and B is one of size 1. Of an embedding
    ([tokens, features]) the tokens are the inputs. BD-LoRA ("Block-Diagonal LoRA for Eliminating Communication
    Overhead in Tensor Parallel LoRA Serving") stores the blocks of a block-diagonal A or B below each other.
    """
    embedding = "lora_embedding_A" in site.tensors
    a, b = (site.flat(f"lora_embedding_{n}" if embedding else f"lora_{n}") for n in "AB")
    scale = lora_scale(site, a.shape[0])
    if blocks := site.config.get("use_bdlora"):
        a, b = _unblocked(site, "a", a, blocks), _unblocked(site, "b", b, blocks)
    return b * np.float32(scale), a


def _unblocked(site: Site, which: str, matrix: Array, blocks: dict[str, Any]) -> Array:
    if not any(pattern in site.module for pattern in blocks.get(f"target_modules_bd_{which}") or ()):
        return matrix
    count = int(blocks["nblocks"])
    rows, columns = matrix.shape[0] // count, matrix.shape[1]
    out = np.zeros((rows * count, columns * count), matrix.dtype)
    for i in range(count):
        out[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = matrix[i * rows : (i + 1) * rows]
    return out


def adalora(site: Site) -> Factors:
    """Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning: ΔW = s P Λ Q, Λ diagonal, pruned to rank r.

    peft's scale is alpha over the rank that training began with (plus 1e-5).
    """
    rank = int(site.config.get("init_r") or site.tensors["lora_A"].shape[0])
    alpha = float(site.config.get("lora_alpha") or 0)
    scale = (alpha if alpha > 0 else rank) / (rank + 1e-5)
    return site.tensors["lora_B"] * np.float32(scale), site.tensors["lora_A"] * site.tensors["lora_E"].reshape(-1, 1)


def vera(site: Site) -> Factors:
    """VeRA: Vector-based Random Matrix Adaptation: ΔW = diag(b) B diag(d) A, with B and A shared by all modules.

    They have the size of the largest module; another takes its part of the rows of B and the columns of A.
    """
    b, d = site.tensors["vera_lambda_b"], site.tensors["vera_lambda_d"]
    return b[:, None] * site.shared("vera_B")[: b.size], d[:, None] * site.shared("vera_A")[:, : site.inputs]


def pvera(site: Site) -> Factors:
    """PVeRA: Probabilistic Vector-based Random Matrix Adaptation: VeRA with the mean of the distribution learned.

    The first half of d and of the rows of A give the mean, the second the variance, which only training needs.
    """
    b, d = site.tensors["pvera_lambda_b"], site.tensors["pvera_lambda_d"]
    rank = d.size // 2
    a = site.shared("pvera_A")[:rank, : site.inputs]
    return b[:, None] * site.shared("pvera_B")[: b.size], d[:rank, None] * a


def randlora(site: Site) -> Factors:
    """RandLoRA: Full-rank parameter-efficient fine-tuning of large models: ΔW = s Σₙ Bₙ Λₙ A Γₙ.

    A [r, 1, smaller side] and B [larger side, n, r] are random and shared; Λ [r, n] and Γ [n, smaller side] are
    learned. As peft pairs them: row (i, n) of the scaled A goes with column (n, i) of B, by position.
    """
    learned, gamma = site.tensors["randlora_lambda"], site.tensors["randlora_gamma"]
    rank, bases = learned.shape
    small, large = min(site.outputs, site.inputs), max(site.outputs, site.inputs)
    a = learned[:, :, None] * site.shared("randlora_A")[:, :bases, :small] * gamma[None]
    a = a.reshape(rank * bases, small)
    b = site.shared("randlora_B")[:large, :bases].reshape(large, -1)
    scale = np.float32(site.config["randlora_alpha"] / rank)
    return (b * scale, a) if small == site.inputs else (a.T * scale, b.T)


def vblora(site: Site) -> Factors:
    """VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks: ΔW = B A, cut into pieces of length v.

    Each piece is a softmax-weighted sum of the k vectors of a shared bank whose logits are largest. A file may hold
    the indices of these k and k − 1 weights instead of the logits.
    """
    bank = site.shared("vblora_vector_bank")

    def pieces(name: str) -> Array:
        if (logits := site.tensors.get(name)) is None:
            index = site.tensors[f"{name}_topk_indices"].astype(np.int64)
            first = site.tensors[f"{name}_topk_weights"]
            weights = np.concatenate([first, 1 - first.sum(-1, keepdims=True)], axis=-1)
        else:
            index = np.argsort(-logits, axis=-1, kind="stable")[..., : int(site.config["topk"])]
            top = np.take_along_axis(logits, index, axis=-1)
            weights = np.exp(top - top.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
        return np.asarray((weights[..., None] * bank[index]).sum(-2))

    a, b = pieces("vblora_logits_A"), pieces("vblora_logits_B")  # [r, in/v, v] and [out/v, r, v]
    return b.transpose(0, 2, 1).reshape(-1, b.shape[1]), a.reshape(a.shape[0], -1)


def unilora(site: Site) -> Factors:
    """Uni-LoRA: One Vector is All You Need: each number of A and B is one of a shared vector, times its scale."""
    vector = site.shared("unilora_theta_d")

    def matrix(name: str) -> Array:
        return np.asarray(vector[site.tensors[f"unilora_indices_{name}"]] * site.tensors[f"unilora_scales_{name}"])

    return matrix("B"), matrix("A")


def delora(site: Site) -> Factors:
    """Decoupling Angles and Strength in Low-rank Adaptation (DeLoRA): ΔW = (λ/r) B Ξ A diag(‖W₀‖ of each input).

    Ξ = 1/(‖aᵢ‖ ‖bᵢ‖) for the rows of A and the columns of B, no norm taken for less than 1e-4.
    """
    a, b = site.tensors["delora_A"], site.tensors["delora_B"]
    norms = np.maximum(np.linalg.norm(a, axis=1), 1e-4) * np.maximum(np.linalg.norm(b, axis=0), 1e-4)
    strength = site.tensors["delora_lambda"].reshape(()) / a.shape[0] / norms
    return b * strength.astype(np.float32), a * site.tensors["delora_w_norm"]


def miss(site: Site) -> Factors:
    """MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing (as Bone before): the same [r, out]
    block D is added to every r inputs: ΔW = Dᵀ [I I …], the last I cut off where r doesn't divide the inputs.

    In its "mini" form D repeats the same few columns.
    """
    block = site.tensors["miss_block"]
    rank = block.shape[0]
    if site.config.get("init_weights") == "mini":
        block = np.tile(block, (1, site.outputs // block.shape[1]))
    return block.T, np.tile(np.eye(rank, dtype=np.float32), (1, -(-site.inputs // rank)))[:, : site.inputs]
