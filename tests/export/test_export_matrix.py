"""The export matrix (benchmarks/export_matrix.py): forks and what they take, how files are called, what counts as alike.

No exporter is run: the files are functions here, or a graph of one node.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import export_matrix
import export_matrix_page as pages
from decoder_domain import CASES, cut
from export_matrix_files import Part, Refused, Stepwise, opened
from export_matrix_models import legacy, library_models
from export_matrix_worker import forked, reason

from graphopt.errors import ModelError

# ---- forks


def test_a_fork_gives_back_what_the_work_returns_and_its_cost() -> None:
    def work() -> dict[str, int]:
        held = bytearray(b"x" * 300_000_000)
        time.sleep(0.5)  # until the memory is looked at, also where all cores are busy
        return {"held": len(held)}

    outcome = forked(work, 20)
    assert outcome.value == {"held": 300_000_000}
    assert not outcome.error
    # Within the work a process may also give back some of what it had at the fork.
    assert outcome.peak_mb - outcome.base_mb >= 200
    assert outcome.seconds >= 0.1


def test_a_fork_tells_the_error_at_the_bottom_of_a_chain() -> None:
    def work() -> None:
        try:
            raise KeyError("the cause\nand more")
        except KeyError as error:
            raise RuntimeError("long advice") from error

    assert forked(work, 20).error == "KeyError: 'the cause\\nand more'"
    sentence = ModelError("one sentence")
    sentence.__cause__ = ValueError("not this")
    assert reason(sentence) == "one sentence"


def test_a_fork_ends_at_its_limit_with_what_it_started() -> None:
    outcome = forked(lambda: subprocess.run(["sleep", "60"]).returncode, 0.3)
    assert outcome.error == "it took more than 0.3 s"
    assert outcome.seconds < 20


def test_a_fork_that_dies_says_of_what() -> None:
    assert forked(lambda: os.kill(os.getpid(), signal.SIGKILL), 20).error == "its process died of SIGKILL"


def test_the_worker_keeps_a_record_of_each_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake_exporter.py").write_text(
        "def prepare(name): assert name == 'half'\n"
        "def half(number):\n"
        "    print('noise')\n"
        "    if number % 2: raise ValueError('odd')\n"
        "    return number // 2\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = [{"record": str(tmp_path / f"{n}.json"), "arguments": {"number": n}, "limit": 20} for n in (4, 5)]
    export_matrix.run(sys.executable, "fake_exporter:half", jobs)
    found = [json.loads((tmp_path / f"{n}.json").read_text()) for n in (4, 5)]
    assert [(f["value"], f["error"]) for f in found] == [(2, ""), (None, "ValueError: odd")]
    export_matrix.run(sys.executable, "no_such_exporter:half", jobs[:1])
    assert json.loads((tmp_path / "4.json").read_text())["error"].startswith("not installed")


# ---- files


def counter(past: str, present: str, prompts: bool = True, steps: bool = True) -> Part:
    """A decoder whose cache holds tokens, and whose logits are the sum of the real ones so far."""

    def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
        new = feeds["input_ids"][:, None, :, None].astype(np.float32)
        held = np.concatenate([feeds[past], new], 2) if steps else new
        assert prompts or feeds[past].shape[2]
        mask = feeds["attention_mask"]
        assert held.shape[2] == mask.shape[1]
        sums = np.cumsum(held[:, 0, :, 0] * mask, 1)[:, -new.shape[2] :]
        return {"logits": sums[..., None], present: held}

    inputs: dict[str, list[Any]] = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "total"]}
    if steps:
        inputs[past] = ["batch", 1, "past", 1]
    return Part(inputs, {"input_ids": "int64", past: "float"}, ["logits", present], run)


PAST, PRESENT = "past_key_values.0.key", "present.0.key"
LEAF = "past_key_values.layers.0.keys"
LAYOUTS = {
    "one file": [counter(PAST, PRESENT)],
    "two files": [counter(PAST, PRESENT, prompts=False), counter(PAST, PRESENT, steps=False)],
    "leaf paths": [
        counter(f"input.{LEAF}", f"output.{LEAF}", prompts=False),
        counter(LEAF, LEAF, steps=False),
    ],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_file_fills_its_own_cache_whatever_its_names(layout: str) -> None:
    files = Stepwise(LAYOUTS[layout], encoded=False)
    for case in CASES:
        tokens = case.tokens(9)
        whole = np.cumsum(tokens["input_ids"] * tokens["attention_mask"], 1)
        state: Mapping[str, Any] = {}
        if case.past:
            state = files.call(cut(tokens, 0, case.past), {}, 0)[1]
        found = files.call(cut(tokens, case.past, whole.shape[1]), state, case.past)[0]
        assert np.array_equal(found[..., 0], whole[:, case.past :])


def test_files_say_what_they_dont_take() -> None:
    tokens = CASES[0].tokens(9)
    with pytest.raises(Refused, match="no cache"):
        Stepwise([counter(PAST, PRESENT, steps=False)], encoded=False).call(cut(tokens, 3, 4), {}, 3)
    strange = Part({"input_ids": ["b", "s"], "salt": [1]}, {}, ["logits"], dict)
    with pytest.raises(Refused, match="an input salt"):
        Stepwise([strange], encoded=False).call(tokens, {}, 0)


@pytest.mark.parametrize("names", ["bare", "decoder"])
def test_encoder_and_decoder_are_told_apart_by_their_inputs(names: str) -> None:
    """The mask of a decoder's file is the encoder's where its tokens are called the decoder's."""

    def encode(feeds: Mapping[str, Any]) -> dict[str, Any]:
        return {"last_hidden_state": feeds["input_ids"] * feeds["attention_mask"] * 1.0}

    ids, mask = (
        ("decoder_input_ids", "attention_mask") if names == "decoder" else ("input_ids", "encoder_attention_mask")
    )
    states = "encoder_outputs.last_hidden_state" if names == "decoder" else "encoder_hidden_states"

    def decode(feeds: Mapping[str, Any]) -> dict[str, Any]:
        assert feeds[mask].shape == feeds[states].shape
        return {"logits": feeds[ids] + feeds[states].sum()}

    encoder = Part({"input_ids": ["b", "s"], "attention_mask": ["b", "s"]}, {}, ["last_hidden_state"], encode)
    decoder = Part({ids: ["b", "t"], mask: ["b", "s"], states: ["b", "s"]}, {}, ["logits"], decode)
    files = Stepwise([decoder, encoder], encoded=True)
    given = {"input_ids": np.array([[1, 2, 3]]), "attention_mask": np.array([[0, 1, 1]])}
    tokens = {"input_ids": np.array([[10, 20]]), "attention_mask": np.ones((1, 2))}
    assert files.call(tokens, files.begin(given), 0)[0].tolist() == [[15, 25]]


def test_a_file_is_opened_with_types_and_sizes(tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (int32[batch, 3] input_ids) => (float[batch, 3] logits) { logits = Cast<to = 1>(input_ids) }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    part = opened(tmp_path / "m.onnx")
    assert part.inputs == {"input_ids": ["batch", 3]}
    assert part.types == {"input_ids": "int32"}
    assert part.call({"input_ids": np.ones((2, 3), np.int64)})["logits"].tolist() == [[1.0] * 3] * 2


# ---- the judge


@pytest.mark.export
def test_the_judge_sees_what_is_right_and_what_is_not(tmp_path: Path) -> None:
    """A tiny decoder, saved as a folder; its files are the module itself, right and with positions that count padding."""
    import torch
    import transformers
    from export_matrix_judge import _error, calls, labels
    from export_matrix_models import load, save
    from matrix_models import MODELS

    folder = tmp_path / "gpt2"
    save("gpt2", str(folder))
    module = load(folder)
    assert np.load(folder / "probe.npz")["answer"].shape[:2] == (1, 7)
    names = [f"past_key_values.{i}.{part}" for i in range(2) for part in ("key", "value")]

    def part(counted: bool) -> Part:
        def run(feeds: Mapping[str, Any]) -> dict[str, Any]:
            cache = transformers.DynamicCache()
            for layer in range(2):
                cache.update(*(torch.from_numpy(feeds[n]) for n in names[2 * layer : 2 * layer + 2]), layer)
            given = {n: torch.from_numpy(v) for n, v in feeds.items() if n not in names}
            if not counted:
                del given["position_ids"]
            with torch.no_grad():
                result = module(**given, past_key_values=cache, use_cache=True)
            held = [t for layer in result.past_key_values.layers for t in (layer.keys, layer.values)]
            present = [name.replace("past_key_values", "present") for name in names]
            return dict(zip(["logits", *present], [t.numpy() for t in (result.logits, *held)], strict=True))

        inputs: dict[str, list[Any]] = {n: ["batch", "s"] for n in ("input_ids", "attention_mask", "position_ids")}
        inputs |= {name: ["batch", 4, "past", 8] for name in names}
        return Part(inputs, dict.fromkeys(names, "float"), ["logits"], run)

    model = MODELS["gpt2"]
    good = {call.label: _error(call) for call in calls(model, module, [part(counted=True)])}
    assert list(good) == labels(model) == [case.label for case in CASES]
    assert all(isinstance(error, float) and error < 1e-5 for error in good.values())
    bad = {call.label: _error(call) for call in calls(model, module, [part(counted=False)])}
    off = {label for label, error in bad.items() if isinstance(error, str) or error > 1e-3}
    assert off == {label for label in bad if "left" in label or "decode, right" in label}


def test_every_model_of_the_library_has_calls() -> None:
    from export_matrix_judge import labels

    models = list(library_models())
    assert len(models) >= 80
    assert all(len(found := labels(model)) == len(set(found)) > 1 for model in models)


def test_an_older_configuration_has_its_rotary_settings_at_the_top() -> None:
    made = legacy({"a": 1, "rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 5.0}})
    assert made["rope_theta"] == 5.0
    assert made["rope_scaling"] == {"rope_type": "yarn", "factor": 2.0}
    plain = legacy({"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}})
    assert plain["text_config"]["rope_theta"] == 7.0
    assert plain["text_config"]["rope_scaling"] is None


# ---- the page


def result(tool: str, model: str, error: str = "", **calls: Any) -> dict[str, Any]:
    sizes = {
        "cpu_seconds": 2.0,
        "seconds": 3.0,
        "base_mb": 100.0,
        "peak_mb": 150.0,
        "own": None,
        "bytes": 1,
        "without": [],
    }
    return {"tool": tool, "model": model, "error": error, "calls": calls, "nodes": 5, **sizes}


def test_the_page_counts_and_lists() -> None:
    results = [
        result("graphopt", "llama", prefill=1e-6, decode=1e-6),
        result("torch", "llama", prefill=1e-6, decode=0.5),
        result("optimum", "llama", error="ValueError: custom architecture"),
    ]
    first, second, third = pages.summary(results)
    assert first["right in every call"] == "1"
    assert second["right in every call"] == "0"
    assert second["calls alike, of the exported"] == "1 of 2"
    assert third["exported"] == "0"
    text = pages.page(results, {"llama": "rotary"}, {"torch": "2"})
    assert "| llama | rotary | 2/2 · 2.0 s · 50 MB | 1/2 · 2.0 s · 50 MB | – |" in text
    assert "- other numbers (1): llama by 0.5 (decode)" in text
    assert "- ValueError: custom architecture (1): llama" in text
    assert not pages.right(result("torch", "empty"))
    rows = json.loads(export_matrix.listed({"torch": "2"}, results))["results"]
    assert [row["calls"] for row in rows] == [row["calls"] for row in results]
