"""graphopt bench --generate, and what graphopt inspect says of a cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_decoders import decoder


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "growing.onnx", tmp_path / "shared.onnx"
    onnx.save(decoder("concat", positions=True), paths[0])
    onnx.save(decoder("group-query", rotary=False, positions=True), paths[1])
    return paths


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer, models

    path = tmp_path / "tokenizer"
    path.mkdir()
    vocabulary = {chr(97 + i): i for i in range(26)}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(path / "tokenizer.json"))
    return path


SIZES = ("--prompt-tokens", 8, "--new-tokens", 4, "--runs", 3)


def test_speed_of_two_decoders(run, models) -> None:
    code, out, _ = run("bench", models[0], "--generate", "--against", models[1], *SIZES, "--batch", 2, "--json")
    assert code == 0
    data = json.loads(out)
    assert [m["cache"] for m in data["models"]] == ["growing", "static"]
    assert (data["batch"], data["prompt_tokens"], data["new_tokens"], data["runs"]) == (2, 8, 4, 3)
    assert all(m["prefill_tokens_s"] > 0 and m["decode_tokens_s"] > 0 for m in [*data["models"], data["control"]])
    assert data["models"][0]["decode_ratio"]["median"] == 1
    assert data["control"]["name"].endswith("(control)")
    code, out, _ = run("bench", *models, "--generate", *SIZES, "--cache", "growing", "--threads", 1)
    assert code == 0
    assert "Tokens read per second (prefill)" in out
    assert "(control)" in out
    assert "static" not in out


def test_perplexity_of_a_text(run, models, tokenizer, tmp_path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(97 + i) for i in np.random.default_rng(0).integers(0, 26, 100)))
    arguments = ("--generate", *SIZES, "--perplexity", text, "--window", 16)
    code, out, _ = run("bench", *models, *arguments, "--tokenizer", tokenizer, "--json")
    assert code == 0
    first, second = json.loads(out)["perplexity"]
    assert (first["tokens"], first["windows"]) == (90, 6)
    assert first["value"] == pytest.approx(second["value"], rel=1e-4)
    code, out, _ = run("bench", models[0], *arguments, "--tokenizer", tokenizer, "--tokens", 40)
    assert code == 0
    assert "over 30 tokens in 2 windows of 16 tokens" in " ".join(out.split())
    code, _, err = run("bench", models[0], *arguments)
    assert code == 2
    assert "needs a tokenizer" in err
    code, _, err = run("bench", models[0], *arguments, "--tokenizer", tmp_path / "none")
    assert code == 4
    assert "There is no tokenizer at" in err


def test_options_that_dont_go_together(run, models) -> None:
    assert run("bench", models[0], "--new-tokens", 3)[0] == 2
    assert "--new-tokens goes with --generate only" in run("bench", models[0], "--new-tokens", 3)[2]
    assert run("bench", models[0], "--generate", "--dim", "batch=1")[0] == 2
    code, _, err = run("bench", models[0], "--generate", "--cache", "static")
    assert code == 2
    assert "joined by Concat" in err


def test_inspect_says_what_the_cache_is(run, models) -> None:
    code, out, _ = run("inspect", models[1])
    words = " ".join(out.split())
    assert code == 0
    assert "KV cache: 2 layers of 2 KV heads of 16 (BHSD, FLOAT, by GroupQueryAttention, past and present may" in words
    assert "tokens 'input_ids', mask 'attention_mask', positions 'position_ids', logits 'logits'" in words
    data = json.loads(run("inspect", models[0], "--json")[1])["kv_cache"]
    assert data["pairs"][0]["past"] == "past_key_values.0.key"
    assert not data["shared_buffer"]


def test_optimize_renames(run, tmp_path) -> None:
    path = tmp_path / "odd.onnx"
    onnx.save(decoder("concat", names="in{}{} out{}{}"), path)
    code, out, _ = run("optimize", path, "--rename-kv-cache", "-o", tmp_path / "named.onnx")
    assert code == 0
    assert "Renamed: 8 inputs and outputs" in out
    assert run("verify", path, tmp_path / "named.onnx")[0] == 0
    assert run("optimize", path, "--rename-kv-cache", "--bench", "--force")[0] == 2
    plain = tmp_path / "plain.onnx"
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[b, 4] x) => (float[b, 4] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), plain)
    code, _, err = run("optimize", plain, "--rename-kv-cache")
    assert code == 2
    assert "is for decoders" in err
