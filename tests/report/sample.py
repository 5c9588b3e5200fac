"""A report as `graphopt.optimize` makes one of a 6-layer encoder, with everything a report can hold; numbers invented."""

from __future__ import annotations

import copy
from typing import Any

EVIL = "<script>alert('x')</script>"
"""A node name that an attacker, or a careless exporter, may write."""

PROBES = [
    ("small", "batch 1, sequence 16; noise"),
    ("batch", "batch 3, sequence 16; noise"),
    ("one", "batch 1, sequence 1; noise"),
    ("long", "batch 1, sequence 128; noise"),
    ("left", "batch 3, sequence 16; noise; padding on the left"),
    ("right", "batch 3, sequence 16; noise; padding on the right"),
]


def _stats(nodes: int, parameters: int = 22_713_216, flops: int = 5_642_000_000) -> dict[str, int]:
    return {"nodes": nodes, "parameters": parameters, "weight_bytes": 4 * parameters, "flops": flops}


def _site(node: str, op_type: str, outcome: str, detail: str) -> dict[str, str]:
    return {"node": node, "op_type": op_type, "outcome": outcome, "detail": detail}


def output(
    name: str, probe: str, mode: str, max_abs: float | None, margin: float | None, reason: str = ""
) -> dict[str, Any]:
    """One compared output, as `Verdict.to_dict()` lists it; a margin of None is an infinite one."""
    return {
        "optimizations": mode,
        "probe": probe,
        "name": name,
        "ok": margin is not None and margin <= 1,
        "max_abs": max_abs,
        "max_rel": None if max_abs is None else max_abs / 4,
        "margin": margin,
        "tolerance": {"absolute": 1e-4, "relative": 1e-4, "floor": 1e-7} if max_abs else None,
        "reason": reason,
        "scale": 4.0,
    }


def verdict(scale: float = 1.0) -> dict[str, Any]:
    """A verdict that passes; `scale` 0 makes every output equal without any difference."""
    outputs = []
    for mode in ("none", "all"):
        for i, (probe, _) in enumerate(PROBES, 1):
            outputs.append(output("last_hidden_state", probe, mode, scale * 1.4e-6 * i, scale * 0.0052 * i))
            outputs.append(output("pooler_output", probe, mode, scale * 4.1e-7 * i, scale * 0.0019 * i))
    return {
        "ok": True, "summary": "Equal: 2 outputs on 6 probes.", "margin": 0.03 * scale, "failures": [], "notes": [],
        "seconds": 0.52, "outputs": outputs,
    }  # fmt: skip


def failing_verdict() -> dict[str, Any]:
    """A verdict that fails: one output beyond the tolerance, one of another shape."""
    data = verdict()
    reason = "is off by 0.31, 7.8e-02 of its largest magnitude 4"
    data["ok"], data["margin"] = False, None
    data["summary"] = f"Output 'last_hidden_state' {reason} on probe 'batch' (without ONNX Runtime's optimizations)."
    data["outputs"][2] = output("last_hidden_state", "batch", "none", 0.31, 37.5, reason)
    data["outputs"][3] = output(
        "pooler_output", "batch", "none", None, None, "has shape [3, 384] instead of [3, 16, 384]"
    )
    return data


def broken_verdict() -> dict[str, Any]:
    """A verdict about a result that doesn't load."""
    failure = "ONNX Runtime doesn't load the result: node 'MatMul_3' has no input (without optimizations)"
    return {"ok": False, "summary": failure, "margin": None, "failures": [failure], "notes": ["Output 'r' is random."],
            "seconds": 0.1, "outputs": []}  # fmt: skip


def _record(name: str, family: str, first: int, last: int, number: int = 1, **more: Any) -> dict[str, Any]:
    changed = first != last
    sites = more.pop("sites", [])
    record = {
        "name": name,
        "family": family,
        "guarantee": "exact",
        "options": {},
        "round": number,
        "seconds": 0.012 + 0.0003 * len(name),
        "status": "applied" if changed else "unchanged",
        "detail": "",
        "before": _stats(first),
        "after": _stats(last),
        "sites": sites,
        "verdict": verdict(0.0) if changed and family == "clean" else verdict(0.5) if changed else None,
    }
    return {**record, **more}


def _layers(pattern: str, count: int, start: int = 0) -> list[str]:
    return [pattern.format(i) for i in range(start, start + count)]


LEFT = [
    *(
        {"pass": "raise-layer-norm", **_site(node, "ReduceMean", "left", f"not raised: the gain isn't constant in layer {i}")}
        for i, node in enumerate(_layers("/encoder/layer.{}/output/LayerNorm/ReduceMean", 5))
    ),
    {"pass": "fold-constants", **_site("/embeddings/Gather_2", "Gather", "left",
                                       "constant, but storing its result would make the file 786432 bytes larger")},
    {"pass": "fold-constants", **_site("/embeddings/Expand", "Expand", "left",
                                       "constant, but storing its result would make the file 196608 bytes larger")},
    {"pass": "fold-batch-norm", **_site(EVIL, "BatchNormalization", "left",
                                        "not folded: 'conv_out' is also read by '/head/Add' & by a graph output")},
    *(
        {"pass": "simplify-shapes", **_site(node, "Reshape", "left", "kept: the target shape depends on the data")}
        for node in _layers("/encoder/layer.{}/attention/self/Reshape", 18)
    ),
]  # fmt: skip


def timing(ratio: float = 0.917) -> dict[str, Any]:
    """A benchmark, as `BenchResult.to_dict()` gives it."""

    def model(name: str, median: float) -> dict[str, Any]:
        spread = {"median": median, "low": median - 0.06, "high": median + 0.09}
        return {"name": name, "wall_ms": 6.4 * median, "cpu_ms": 12.3 * median, "wall_ratio": spread, "cpu_ratio": spread,
                "load_s": 0.31}  # fmt: skip

    return {
        "models": [model("minilm/model.onnx", 1.0), model("minilm/model.opt.onnx", ratio)],
        "control": model("minilm/model.onnx (control)", 0.993),
        "runs": 30, "warmup": 5, "calls": 1, "threads": None,
        "feeds": {"input_ids": [1, 128], "attention_mask": [1, 128]},
    }  # fmt: skip


def quality(missed: bool = False) -> dict[str, Any]:
    """A judgement of a decoder, as `graphopt optimize --quality` notes it; `missed` with a floor that isn't held."""

    def metric(name: str, title: str, better: str, value: float | None, **more: Any) -> dict[str, Any]:
        return {"name": name, "title": title, "better": better, "value": value, "reference": None, "scale": "number",
                **more}  # fmt: skip

    reason = "top1 is 87.20 %, 2.80 % below the floor top1>=0.9"
    return {
        "task": "language",
        "metrics": [
            metric("ppl", "perplexity", "lower", 19.0632, reference=18.3106),
            metric("kl", "divergence from the original, nats", "lower", 0.0428),
            metric("top1", "same most probable token", "higher", 0.872, scale="share"),
            metric("accuracy", "accuracy", "higher", 0.7512, reference=0.7524, scale="share"),
        ],
        "samples": "8,176 tokens in 16 windows of 512", "notes": ["A note with <angles>."], "outputs": {},
        "data": "held-out.txt", "bytes": [90_912_004, 23_000_000],
        "floors": {"ppl": "ppl=+5%", **({"top1": "top1>=0.9"} if missed else {})},
        "missed": [{"floor": "top1>=0.9", "metric": "top1", "limit": 0.9, "reason": reason}] if missed else [],
    }  # fmt: skip


def report() -> dict[str, Any]:
    """The sample, a new copy at each call."""
    gelus = [
        _site(n, "Erf", "applied", "raised to Gelu (exact)") for n in _layers("/encoder/layer.{}/intermediate/Erf", 6)
    ]
    norms = [_site(n, "ReduceMean", "applied", "raised to LayerNormalization (epsilon 1e-12)")
             for n in _layers("/encoder/layer.{}/LayerNorm/ReduceMean", 8)]  # fmt: skip
    passes = [
        _record("inline-functions", "clean", 302, 302),
        _record("lift-constants", "clean", 302, 301, sites=[]),
        _record("eliminate-dead-code", "clean", 301, 296),
        _record("deduplicate-initializers", "clean", 296, 296, status="applied",
                after=_stats(296, 22_713_216 - 11_520), before=_stats(296),
                sites=[_site("/embeddings/Add", "Add", "applied", "reads 'w' instead of its copy 'w2'")]),
        _record("eliminate-identities", "clean", 296, 290,
                sites=[_site(EVIL, "Identity", "applied", f"removed: it passes '{EVIL}' on")]),
        _record("eliminate-common-subexpressions", "clean", 290, 281,
                sites=[_site("/Shape_2", "Shape", "applied", "the same as '/Shape'")] * 9),
        _record("simplify-shapes", "clean", 281, 254, options={"max_elements": 64},
                sites=[_site(n, "Gather", "applied", "a size of the input") for n in _layers("/Gather_{}", 14)]),
        _record("convert-opset", "raise", 254, 254),
        _record("fold-constants", "clean", 254, 252, options={"max_bytes": 16384}, seconds=0.41,
                sites=[_site("/Mul_1", "Mul", "applied", "computed (4 bytes)")] * 2),
        _record("raise-layer-norm", "raise", 252, 196, sites=norms),
        _record("raise-rms-norm", "raise", 196, 196),
        _record("raise-gelu", "raise", 196, 172, sites=gelus),
        _record("raise-silu", "raise", 172, 172, status="skipped",
                detail="it requires what the model isn't: opset 24 or later"),
        _record("fold-batch-norm", "fold", 172, 171, status="rolled back", after=_stats(172), verdict=failing_verdict(),
                detail="last_hidden_state is off by 0.31, 7.8e-02 of its largest magnitude 4, on probe 'batch'"),
        _record("eliminate-dead-code", "clean", 172, 171, 2),
        *(_record(n, "clean", 171, 171, 2) for n in ("inline-functions", "lift-constants", "deduplicate-initializers")),
    ]  # fmt: skip
    data = {
        "graphopt": "0.1.0",
        "libraries": {"onnx": "1.23.2", "onnx-ir": "1.1.0", "onnxscript": "0.7.2", "onnxruntime": "1.31.1", "numpy": "2.4.0"},
        "platform": {"python": "3.11.7", "system": "Linux", "machine": "x86_64"},
        "source": {"path": "minilm/model.onnx", "bytes": 90_912_004, "external_data": False},
        "output": {"path": "minilm/model.opt.onnx", "bytes": 90_864_117, "files": ["model.opt.onnx"]},
        "target": "cpu",
        "seed": 0,
        "assumptions": {
            "given": ["no-left-padding", "batch=1"],
            "relied": [
                {"assumption": "no-left-padding", "inputs": {"mask": "attention_mask"}, "pass": "group-query-attention",
                 "reason": "the kernel takes lengths", "meaning": "each row of the attention mask is ones, then zeros"},
                {"assumption": "no-left-padding", "inputs": {"mask": "attention_mask"}, "pass": f"other {EVIL}",
                 "reason": EVIL, "meaning": "each row of the attention mask is ones, then zeros"},
            ],
            "unneeded": ["batch=1"],
        },
        "recipe": {"name": "exact", "passes": [p["name"] for p in passes[:6]] + [{"simplify-shapes": {"max_elements": 64}}]},
        "ok": False,
        "before": _stats(302),
        "after": _stats(171, 22_713_216 - 11_520),
        "seconds": 0.71,
        "verify_seconds": 6.42,
        "operators": {
            "MatMul": [48, 48], "Add": [73, 56], "Reshape": [24, 24], "Transpose": [24, 24], "ReduceMean": [16, 0],
            "Sub": [9, 1], "Pow": [8, 0], "Sqrt": [8, 0], "Div": [20, 6], "Mul": [20, 1], "Erf": [6, 0], "Softmax": [6, 6],
            "LayerNormalization": [5, 13], "Gelu": [0, 6], "Gather": [17, 3], "Shape": [14, 2], "Unsqueeze": [8, 2],
            "Cast": [4, 2], "Identity": [6, 0], f"custom::{EVIL}": [1, 1],
        },
        "passes": passes,
        "left_alone": LEFT,
        "verification": verdict(),
        "probes": [{"name": n, "description": d} for n, d in PROBES],
        "skipped_probes": [{"name": "zero-length", "reason": "the original fails: '/Reshape' gets 0 elements"}],
        "session_settings": [
            {"setting": "session.qdq_matmulnbits_accuracy_level", "value": "4",
             "reason": "measured 1.6 times faster, within the tolerance"},
            {"setting": "disabled_optimizers", "value": "SkipLayerNormFusion",
             "reason": "ONNX Runtime's fusion costs 8 % of the CPU time here"},
        ],
        "timing": timing(),
        "quality": None,
    }  # fmt: skip
    return copy.deepcopy(data)
