"""The attention benchmark (benchmarks/attention.py): its table of calls, what it counts, its page; no tool is run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import attention
import attention_page
import zoo
import zoo_judge
from decoder_domain import CASES, TOLERANCE, Case, Sizes, errors
from tools import BUILDER, GENAI

SIZES = Sizes(layers=2, heads=1, head_size=4, vocabulary=9)
ALIKE = {case.label: 1e-6 for case in CASES}


def decoder(feeds: Mapping[str, Any], padding_counts: bool = False) -> dict[str, Any]:
    """A decoder whose cache holds tokens, and whose logits are the sum of the real ones so far."""
    ids, mask = feeds["input_ids"], feeds["attention_mask"]
    batch, sequence = ids.shape
    past = feeds["past_key_values.0.key"]
    assert mask.shape == (batch, past.shape[2] + sequence)
    new = np.repeat(ids[:, None, :, None], 4, 3).astype(np.float32)
    present = np.concatenate([past, new], 2)
    weights = np.ones_like(mask) if padding_counts else mask
    sums = np.cumsum(present[:, 0, :, 0] * weights, 1)[:, past.shape[2] :]
    caches = {f"present.{layer}.{part}": present for layer in range(2) for part in ("key", "value")}
    return {"logits": np.repeat(sums[..., None], 9, 2) + 1, **caches}


def test_there_is_every_combination_once() -> None:
    assert len(CASES) == len({case.label for case in CASES}) == 2 * 3 * 3


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_the_mask_pads_where_it_says(case: Case) -> None:
    mask = case.mask()
    assert mask.shape[0] == case.batch
    assert (mask == 1).all() == (case.padding == "none")
    if case.padding == "left":
        assert (np.diff(mask, axis=1) >= 0).all()
        assert mask[:, -1].all()
    elif case.padding == "right":
        # After a prompt that was padded at its right, a step's own token lies behind the padding.
        prompt = mask[:, :-1] if case.step == "decode" else mask
        assert (np.diff(prompt, axis=1) <= 0).all()
        assert mask[:, -1].all() == (case.step == "decode")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_positions_count_the_tokens_that_are_real(case: Case) -> None:
    feeds = case.feeds(SIZES, decoder)
    mask = feeds["attention_mask"]
    sequence = feeds["input_ids"].shape[1]
    for row in range(case.batch):
        real = np.flatnonzero(mask[row])
        for column in range(sequence):
            place = mask.shape[1] - sequence + column
            if mask[row, place]:
                assert feeds["position_ids"][row, column] == np.flatnonzero(real == place)
    assert set(feeds) == {"input_ids", "attention_mask", "position_ids", *(f"past_key_values.{k}" for k in _caches())}
    assert feeds["past_key_values.1.value"].shape == (case.batch, 1, mask.shape[1] - sequence, 4)


def _caches() -> list[str]:
    return [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]


def test_errors_are_those_at_real_tokens() -> None:
    def one_off(feeds: Mapping[str, Any]) -> dict[str, Any]:
        logits = decoder(feeds)["logits"]
        padded = feeds["attention_mask"][:, -logits.shape[1] :] == 0
        return {"logits": np.where(padded[..., None], np.nan, logits)}

    def counts_padding(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return decoder(feeds, padding_counts=True)

    def refuses(feeds: Mapping[str, Any]) -> dict[str, Any]:
        if len(feeds["input_ids"]) > 1:
            raise ValueError("one row\nonly")
        return {"logits": np.full_like(decoder(feeds)["logits"], np.inf)}

    found = errors(decoder, {"one": one_off, "counts": counts_padding, "refuses": refuses}, SIZES)
    assert set(found["one"].values()) == {0.0}
    wrong = {label for label, error in found["counts"].items() if error > TOLERANCE}
    assert {label for label in wrong if "none" in label} == set()
    assert "batch 1, chunk, left padding" in wrong
    assert found["refuses"]["batch 1, prefill"] == float("inf")
    assert found["refuses"]["batch 3, decode"] == "one row only"


def test_the_calls_that_a_narrower_domain_claims() -> None:
    found: dict[str, float | str] = {**ALIKE, "batch 3, chunk": "refused", "batch 1, decode, left padding": 0.2}
    assert set(attention.differing(found, narrow=False)) == {"batch 3, chunk", "batch 1, decode, left padding"}
    assert attention.differing(found, narrow=True) == {}
    assert attention.differing({**ALIKE, "batch 1, decode": "refused"}, narrow=True) == {}
    assert set(attention.differing({**ALIKE, "batch 1, decode": 2e-3}, narrow=True)) == {"batch 1, decode"}
    assert set(attention.differing({**ALIKE, "batch 1, decode": float("nan")}, narrow=True)) == {"batch 1, decode"}


def test_attention_is_counted_by_operator(tmp_path: Path) -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 23, "com.microsoft" : 1]>
        g (float[1,2,3,4] x, float[1,3,8] p) => (float[1,2,3,4] y, float[1,2,3,4] z, float[1,3,8] m) {
            y = Attention(x, x, x)
            z = Softmax(y)
            m = com.microsoft.MultiHeadAttention <num_heads = 2> (p, p, p)
        }"""
    )
    ir.save(model, tmp_path / "model.onnx")
    assert zoo_judge.size(tmp_path / "model.onnx")["attention"] == {
        "Attention": 1,
        "Softmax": 1,
        "com.microsoft.MultiHeadAttention": 1,
    }


def test_results_are_kept_and_taken_up(tmp_path: Path) -> None:
    calls: list[str] = []

    def part(tell: zoo.Tell) -> dict[str, Any]:
        tell("working")
        calls.append("made")
        return {"model": "a"}

    assert zoo.collect({"a": part}, tmp_path, resume=False) == [{"model": "a"}]
    assert zoo.collect({"a": part}, tmp_path, resume=True) == [{"model": "a"}]
    assert calls == ["made"]
    zoo.collect({"a": part}, tmp_path, resume=False)
    assert calls == ["made", "made"]


def test_a_judge_that_fails_costs_its_model_only(tmp_path: Path) -> None:
    told: list[str] = []
    tools: dict[str, dict[str, Any]] = {"a": {}}
    request = {"source": str(tmp_path / "none.onnx"), "candidates": {"a": "x"}, "workloads": {}}
    assert zoo.ask("zoo_judge.py", request, tmp_path, tools, told.append) == {"original": {}, "timings": []}
    assert tools["a"]["error"].startswith("can't be judged (exit status 1)")
    assert told[0] == "judging"


def timing(workload: str, tokens: int, **ratios: float) -> dict[str, Any]:
    names = {name.replace("_", " "): [value, value] for name, value in ratios.items()}
    times = {"control": [1.0, 1.0], "ratios": names, "uncertainty": dict.fromkeys(names, 0.0)}
    return {
        "workload": workload,
        "tokens": tokens,
        "agreed": dict.fromkeys(names, 129),
        "original_ms": 900.0,
        **times,
        "wall": {"original_ms": 500.0, **times},
    }


def test_the_page() -> None:
    file = {"loads": True, "equal": True, "errors": ALIKE, "nodes": 342, "attention": {"GroupQueryAttention": 30}}
    model = {
        "model": "smollm2-sdpa20",
        "use": "torch.export",
        "source": "logits as PyTorch's",
        "builder": "logits as PyTorch's in 9",
        "original": {"nodes": 2425, "attention": {"Softmax": 30}, "perplexity": 18.31061},
        "tools": {
            "graphopt": {**file, "perplexity": 18.31062},
            "graphopt assuming": {"error": "no such option"},
            "peer": file,
            BUILDER: file,
            GENAI: file,
        },
        "timings": [
            timing("prefill 512", 512, graphopt=0.9, peer=0.8, genai=0.75),
            timing("decode 128", 128, graphopt=0.6, peer=0.95, genai=0.5),
        ],
    }
    encoder = {
        "model": "smart-turn",
        "use": "",
        "original": {"nodes": 9, "attention": {}},
        "tools": {"graphopt": {"loads": True, "equal": True, "nodes": 7, "attention": {"MultiHeadAttention": 5}}},
        "timings": [timing("batch 1", 1, graphopt=0.5)],
    }
    text = attention_page.page(
        {
            "environment": {"date": "2026-01-01", "onnxruntime": "1", "threads": 2, "processor": "p"},
            "versions": dict.fromkeys(("graphopt", "graphopt assuming", "peer", BUILDER, GENAI), "1"),
            "assumed": ["batch=1"],
            "windows": 40,
            "window": 512,
            "not_measured": [],
            "models": [model, encoder],
        }
    )
    assert "prefill 512: graphopt takes 1.20 of genai's wall-clock time, 1.20 of its CPU time" in text
    assert "- smollm2-sdpa20, graphopt: 342: 30 GroupQueryAttention; 18, 1e-06 of 18 calls answered alike;" in text
    assert "ahead beyond the noise of the CPU time on 2 of 3: smollm2-sdpa20 prefill 512 (genai), " in text
    assert "| smollm2-sdpa20 | 18.3106 | 18.3106 | – | – | – | – |" in text
    assert "| smollm2-sdpa20 decode 128 | 256 | 427 (129) | – | 269 (129) | – | 512 (129) |" in text
    assert "| smart-turn | 9: none | 7: 5 MultiHeadAttention | – |" in text
    assert "- smollm2-sdpa20, graphopt assuming: no such option" in text


def test_every_part_is_known() -> None:
    assert set(attention.ENCODERS) >= {"smart-turn", "paraphrase-minilm", "ppocr-v4-rec", "ppocr-v6-rec"}
    assert len(attention.SOURCES) == 4
    assert all(len(entry.workloads) in (2, 3) for entry in attention.ENCODERS.values())
    assert attention.ENCODERS["smart-turn"].workloads == {"batch 1": {"s6": 1}, "batch 8": {"s6": 8}}
