"""The methods that can be merged: for each what its tensors are called and the formula that they go into.

The formulas themselves are in `low_rank` (ΔW = B A), `additive` (another ΔW) and `transforms` (W' = f(W)).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import UsageError
from graphopt.export.adapters import additive, low_rank, transforms
from graphopt.export.adapters.site import Array, Site

Shapes = Mapping[str, tuple[int, ...]]
Features = tuple[int | None, int | None]
"""Output and input features that the weight must have, as far as the adapter's shapes tell."""


@dataclass(frozen=True)
class Method:
    """How one method changes a module; exactly one of `factors`, `delta` and `transform` is set, or only `bias`.

    Attributes:
        markers: How the names of its tensors begin.
        features: The features of the weight by the shapes of the adapter's tensors.
        factors: B and A of ΔW = B A.
        delta: ΔW.
        transform: W' from W.
        magnitude: The tensor that holds the norm of each row of W' (DoRA): W' = diag(m/‖W + ΔW‖) (W + ΔW).
        bias: b' from b and a function that gives the base weight W.
        by_rows: Whether `transform` makes each row of W' of the same row of W alone and can be given any rows.
        infinite: Whether its tensors may hold infinities.
    """

    markers: tuple[str, ...]
    features: Callable[[Shapes, Mapping[str, Any]], Features]
    factors: Callable[[Site], low_rank.Factors] | None = None
    delta: Callable[[Site], Array] | None = None
    transform: Callable[[Site, Array], Array] | None = None
    magnitude: str | None = None
    bias: Callable[[Site, Array, Callable[[], Array]], Array] | None = None
    by_rows: bool = False
    infinite: bool = False

    @property
    def adds(self) -> bool:
        """Whether it adds to the weight, so that several can be summed."""
        return (self.factors is not None or self.delta is not None) and self.magnitude is None


def method_of(config: Mapping[str, Any], folder: Path) -> Method:
    """The method of an adapter.

    Raises:
        UsageError: It isn't known, isn't one that a weight can take in, or lacks what is needed to take it in.
    """
    kind = str(config["peft_type"]).upper()
    if kind in _PROMPTS:
        raise UsageError(
            f"{folder} is a {kind} adapter, which adds learned inputs and changes no weight, so it can't be merged"
        )
    if kind in _ROUTED:
        raise UsageError(
            f"{folder} is a {kind} adapter, whose change of a weight depends on the input, so it can't be merged"
        )
    if kind not in METHODS:
        raise UsageError(f"{folder} is a {kind} adapter, which isn't one of {', '.join(sorted(METHODS))}")
    return _variant(METHODS[kind], kind, config, folder)


def _variant(method: Method, kind: str, config: Mapping[str, Any], folder: Path) -> Method:
    if config.get("layer_replication"):
        raise UsageError(f"{folder} repeats layers of its base (layer_replication), which changes more than weights")
    if config.get("target_parameters") and kind != "LORA":
        raise UsageError(f"{folder} adapts parameters by name (target_parameters), which is known of LoRA only")
    if kind in ("MISS", "BONE") and config.get("init_weights") == "bat":
        return dataclasses.replace(method, factors=None, transform=transforms.bat, features=_bat_features)
    if kind != "LORA":
        return method
    for key in ("use_qalora", "alora_invocation_tokens", "arrow_config"):
        if config.get(key):
            raise UsageError(f"{folder} was made with {key}, and such a LoRA doesn't merge into a weight")
    start = config.get("init_lora_weights")
    start = start.lower() if isinstance(start, str) else ""
    special = {"pissa": transforms.pissa, "olora": transforms.olora}.get(start)
    if config.get("kasa_config"):
        special = transforms.kasa
    if special is None and (start.startswith(("pissa_niter", "corda", "lora_ga", "loftq"))):
        raise UsageError(
            f"{folder} began with a changed base (init_lora_weights {start!r}) that can't be computed again; save it "
            "with peft's path_initial_model_for_weight_conversion, or give the changed base and set init_lora_weights "
            "to true in adapter_config.json"
        )
    if special is not None:
        if config.get("use_dora"):
            raise UsageError(f"{folder} has DoRA together with init_lora_weights {start!r}, which isn't supported")
        return dataclasses.replace(method, factors=None, transform=special)
    return dataclasses.replace(method, magnitude="lora_magnitude_vector") if config.get("use_dora") else method


def _sizes(output: str, inputs: str) -> Callable[[Shapes, Mapping[str, Any]], Features]:
    """Features of a matrix "output" [out, …] and one "inputs" [r, in, …]."""

    def features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
        out = next((shapes[n] for n in output.split("|") if n in shapes), None)
        into = next((shapes[n] for n in inputs.split("|") if n in shapes), None)
        return (out[0] if out else None), (int(np.prod(into[1:])) if into else None)

    return features


def _lora_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    out, into = _sizes("lora_B|lora_embedding_B", "lora_A|lora_embedding_A")(shapes, config)
    if out is None or into is None:
        raise KeyError("lora_A and lora_B")
    return (None, None) if config.get("use_bdlora") else (out, into)


def _c3a_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    rows, columns, size = shapes["c3a_kernel"]
    return rows * size, columns * size


def _gralora_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    a, b = shapes["gralora_A"], shapes["gralora_B"]
    return b[0] * b[2], a[0] * a[1]


def _lokr_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    if {"lokr_w1", "lokr_w2"} <= shapes.keys():
        first, second = shapes["lokr_w1"], shapes["lokr_w2"]
        return first[0] * second[0], int(np.prod(first[1:]) * np.prod(second[1:]))
    return None, None


def _loha_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    if "hada_t1" in shapes:
        core = shapes["hada_t1"]
        return shapes["hada_w1_a"][1], int(shapes["hada_w1_b"][1] * np.prod(core[2:]))
    return shapes["hada_w1_a"][0], shapes["hada_w1_b"][1]


def _oft_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    name = "oft_R" if "oft_R" in shapes else "oft_embedding_R"
    if name not in shapes:
        return None, None
    if config.get("block_share"):
        return None, None
    return None, shapes[name][0] * (1 + round((1 + 8 * shapes[name][1]) ** 0.5)) // 2


def _boft_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    return int(np.prod(shapes["boft_s"])), shapes["boft_R"][1] * shapes["boft_R"][2]


def _ia3_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    shape = shapes["ia3_l"]
    if len(shape) != 2:
        return None, None
    return (None, shape[1]) if shape[0] == 1 else (shape[0], None)


def _miss_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    return (None if config.get("init_weights") == "mini" else shapes["miss_block"][1]), None


def _bat_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    return shapes["miss_block"][0] * shapes["miss_block"][1], None


def _glora_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    return _sizes("glora_A.Xd|glora_B.Xd", "glora_A.Xu|glora_B.Xu")(shapes, config)


def _road_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    size = shapes["road_theta"][0]
    return {"road_1": size * 2, "road_4": size // 2}.get(str(config.get("variant")), size), None


def _supertuning_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    return _sizes("supertuning_lora_B", "supertuning_lora_A")(shapes, config)


def _vblora_features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    a, b = (next(s for n, s in shapes.items() if n.startswith(f"vblora_logits_{k}")) for k in "AB")
    length = int(config["vector_length"])
    return b[0] * length, a[1] * length


def _unknown(shapes: Shapes, config: Mapping[str, Any]) -> Features:
    return None, None


def _of(output: str | None, inputs: str | None, axis: int = 0) -> Callable[[Shapes, Mapping[str, Any]], Features]:
    """Features that are the first dimension of a tensor each."""

    def features(shapes: Shapes, config: Mapping[str, Any]) -> Features:
        return (shapes[output][0] if output else None), (shapes[inputs][axis] if inputs else None)

    return features


def _lora_bias(site: Site, bias: Array, weight: Callable[[], Array]) -> Array:
    """With `lora_bias` B has a bias too: b' = b + (alpha/r) b_B."""
    own = site.tensors.get("lora_B.bias")
    scale = np.float32(low_rank.lora_scale(site, site.tensors["lora_A"].shape[0])) if own is not None else 0
    return bias if own is None else np.asarray(bias + scale * own)


METHODS: dict[str, Method] = {
    "LORA": Method(("lora_",), _lora_features, factors=low_rank.lora, bias=_lora_bias),
    "ADALORA": Method(("lora_",), _sizes("lora_B", "lora_A"), factors=low_rank.adalora),
    "VERA": Method(("vera_",), _of("vera_lambda_b", None), factors=low_rank.vera),
    "PVERA": Method(("pvera_",), _of("pvera_lambda_b", None), factors=low_rank.pvera),
    "RANDLORA": Method(("randlora_",), _unknown, factors=low_rank.randlora),
    "VBLORA": Method(("vblora_",), _vblora_features, factors=low_rank.vblora, infinite=True),
    "UNILORA": Method(("unilora_",), _of("unilora_indices_B", "unilora_indices_A", axis=1), factors=low_rank.unilora),
    "DELORA": Method(("delora_",), _sizes("delora_B", "delora_A"), factors=low_rank.delora),
    "MISS": Method(("miss_",), _miss_features, factors=low_rank.miss),
    "BONE": Method(("bone_",), _miss_features, factors=low_rank.miss),
    "LOHA": Method(("hada_",), _loha_features, delta=additive.loha),
    "LOKR": Method(("lokr_",), _lokr_features, delta=additive.lokr),
    "FOURIERFT": Method(("fourierft_",), _unknown, delta=additive.fourierft),
    "C3A": Method(("c3a_",), _c3a_features, delta=additive.c3a),
    "SHIRA": Method(("shira_",), _unknown, delta=additive.shira),
    "SUPERTUNING": Method(("supertuning_",), _supertuning_features, delta=additive.supertuning),
    "GRALORA": Method(("gralora_",), _gralora_features, delta=additive.gralora),
    "OFT": Method(("oft_",), _oft_features, transform=transforms.oft, by_rows=True),
    "BOFT": Method(("boft_",), _boft_features, transform=transforms.boft),
    "HRA": Method(("hra_",), _of(None, "hra_u"), transform=transforms.hra, by_rows=True),
    "IA3": Method(
        ("ia3_",), _ia3_features, transform=transforms.ia3, bias=lambda site, b, w: transforms.ia3_bias(site, b)
    ),
    "ROAD": Method(
        ("road_",), _road_features, transform=transforms.road, bias=lambda site, b, w: transforms.road(site, b)
    ),
    "HIRA": Method(("hira_",), _sizes("hira_B|hira_embedding_B", "hira_A|hira_embedding_A"), transform=transforms.hira),
    "GLORA": Method(
        ("glora_",),
        _glora_features,
        transform=transforms.glora,
        bias=lambda site, b, w: transforms.glora_bias(site, b, w()),
    ),
    "DEFT": Method(("deft_",), _of("deft_P", None), transform=transforms.deft),
    "OSF": Method(("osf_",), _of("osf_svd_params.U_low", "osf_svd_params.V_low", axis=1), transform=transforms.osf),
    "BEFT": Method(("beft_",), _unknown, bias=lambda site, b, w: np.asarray(b + site.tensors["beft_bias"].reshape(-1))),
    "LN_TUNING": Method(("ln_tuning_layers",), _unknown),
    "TRAINABLE_TOKENS": Method(("trainable_tokens_delta",), _unknown),
}
"""Every method by its peft_type."""

_PROMPTS = {
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
}  # fmt: skip
_ROUTED = {"XLORA", "POLY", "LILY", "PEANUT", "SHADOW"}
