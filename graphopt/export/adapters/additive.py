"""Adapters that add a matrix which isn't stored as a product of two: ΔW [out, in].

The kernels of a convolution are one row each: "in" is input channels times kernel positions.
"""

from __future__ import annotations

import numpy as np

from graphopt.export.adapters.site import Array, Site
from graphopt.export.dependencies import require


def loha(site: Site) -> Array:
    """FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning (LoHa):
    ΔW = (alpha/r) (A₁ B₁) ⊙ (A₂ B₂); with a core t [r, r, height, width] each factor is t ×₁ A ×₂ B.
    """

    def factor(n: int) -> Array:
        a, b = site.tensors[f"hada_w{n}_a"], site.tensors[f"hada_w{n}_b"]
        if (core := site.tensors.get(f"hada_t{n}")) is None:
            return np.asarray(a @ b)
        return np.asarray(np.einsum("ijkl,jr,ip->prkl", core, b, a, optimize=True))

    scale = float(site.setting("alpha_pattern", "alpha")) / site.tensors["hada_w1_b"].shape[0]
    return np.asarray((factor(1) * factor(2) * np.float32(scale)).reshape(site.outputs, site.inputs))


def lokr(site: Site) -> Array:
    """Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation (LoKr):
    ΔW = (alpha/r) W₁ ⊗ W₂, either of them whole or a product of two, W₂ of a convolution also with a core.
    """

    def factor(n: int) -> Array:
        if (whole := site.tensors.get(f"lokr_w{n}")) is not None:
            return whole
        a, b = site.tensors[f"lokr_w{n}_a"], site.tensors[f"lokr_w{n}_b"]
        if (core := site.tensors.get(f"lokr_t{n}")) is None:
            return np.asarray(a @ b)
        return np.asarray(np.einsum("ijkl,ip,jr->prkl", core, a, b, optimize=True))

    first, second = factor(1), factor(2)
    first = first.reshape(*first.shape, *[1] * (second.ndim - 2))
    scale = float(site.setting("alpha_pattern", "alpha")) / float(site.setting("rank_pattern", "r"))
    return (np.kron(first, second) * np.float32(scale)).reshape(site.outputs, site.inputs)


def fourierft(site: Site) -> Array:
    """Parameter-Efficient Fine-Tuning with Discrete Fourier Transform: ΔW = s · Re(IDFT₂(F)), F zero but at n places.

    The places aren't stored: they are the first n of torch's random permutation for the seed in the configuration.
    """
    torch = require("torch")
    spectrum = site.tensors["fourierft_spectrum"]
    generator = torch.Generator().manual_seed(int(site.config["random_loc_seed"]))
    places = torch.randperm(site.outputs * site.inputs, generator=generator)[: spectrum.size].numpy()
    dense = np.zeros(site.outputs * site.inputs, np.float32)
    dense[places] = spectrum
    # pocketfft works in the precision of what it gets, and complex64 is enough for what is added in float32.
    found = np.fft.ifft2(dense.reshape(site.outputs, site.inputs)).real
    return (found * float(site.config["scaling"])).astype(np.float32)


def c3a(site: Site) -> Array:
    """Parameter-Efficient Fine-Tuning via Circular Convolution (C³A): ΔW of circulant blocks, over the inputs' number.

    Block (m, n) of the kernels w [out/b, in/b, b] has at (t, s) the number w[(s − t) mod b].
    """
    kernel = site.tensors["c3a_kernel"]
    rows, columns, size = kernel.shape
    place = (np.arange(size)[None, :] - np.arange(size)[:, None]) % size
    return kernel[:, :, place].transpose(0, 2, 1, 3).reshape(rows * size, columns * size) / np.float32(site.inputs)


def shira(site: Site) -> Array:
    """Sparse High Rank Adapters (SHiRA): ΔW has the stored numbers at the stored places, and zeros."""
    out = np.zeros((site.outputs, site.inputs), np.float32)
    rows, columns = site.tensors["shira_indices"].astype(np.int64)
    np.add.at(out, (rows, columns), site.tensors["shira_weight"])
    return out


def supertuning(site: Site) -> Array:
    """peft's Super and Supra: numbers at stored flat places of W, and (alpha/r) B A where there is a rank."""
    out = np.zeros(site.outputs * site.inputs, np.float32)
    np.add.at(out, site.tensors["supertuning_indices"].astype(np.int64), site.tensors["supertuning_values"])
    delta = out.reshape(site.outputs, site.inputs)
    if (a := site.tensors.get("supertuning_lora_A")) is not None:
        scale = np.float32(float(site.config["lora_alpha"]) / a.shape[0])
        delta += scale * (site.tensors["supertuning_lora_B"] @ a)
    return delta


def gralora(site: Site) -> Array:
    """GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning: k × k blocks of rank r/k each.

    With A [k, in/k, r] and B [k, r, out/k], block (g, n) is (Aₙ[:, g-th r/k] · B_g[n-th r/k, :])ᵀ; a plain B A of
    rank `hybrid_r` may be added. All of it is scaled by alpha / (r + hybrid_r).
    """
    a, b = site.tensors["gralora_A"], site.tensors["gralora_B"]
    count, _, rank = a.shape
    part = rank // count
    # a as [n, in/k, g, r/k], b as [g, n, r/k, out/k]
    blocks = np.einsum(
        "nigq,gnqo->goni",
        a[:, :, : part * count].reshape(count, -1, count, part),
        b[:, : part * count].reshape(count, count, part, -1),
        optimize=True,
    )
    delta = blocks.reshape(site.outputs, site.inputs)
    hybrid = int(site.config.get("hybrid_r") or 0)
    if hybrid:
        delta = delta + site.tensors["gralora_B_general"] @ site.tensors["gralora_A_general"]
    return np.asarray(delta * np.float32(float(site.config["alpha"]) / (rank + hybrid)))
