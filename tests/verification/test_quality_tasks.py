"""The task of a model, guessed from its graph."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from tiny_decoders import decoder

from graphopt.graph.load import load
from graphopt.models import catalogue
from graphopt.verification.quality.tasks import Guess, Task, guess_task

REAL: dict[str, tuple[Task, str | None]] = {
    "yolov8n": ("detection", None),
    "layout": ("detection", None),
    "ppocr-v4-rec": ("recognition", "softmax_11.tmp_0"),
    "ppocr-v6-rec": ("recognition", "fetch_name_0"),
    "ppocr-cls": ("classification", "save_infer_model/scale_0.tmp_1"),
    "orientation": ("classification", "fetch_name_0"),
    "open-nsfw": ("classification", "outputs"),
    "magika": ("classification", "target_label"),
    "paraphrase-minilm": ("embedding", "onnx::Shape_422"),
    "silero-vad": ("generic", None),
    "smart-turn": ("classification", "logits"),
    "ppocr-v4-det": ("generic", None),
}


def guessed(text: str, task: Task | None = None, properties: dict[str, str] | None = None) -> Guess:
    model = ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {text}'))
    model.metadata_props.update(properties or {})
    return guess_task(model, task)


def test_decoders() -> None:
    for kind in ("group-query", "attention", "concat"):
        found = guess_task(ir.from_proto(decoder(kind)))
        assert (found.task, found.output) == ("language", "logits")
        assert "KV cache" in found.reason


def test_images() -> None:
    image = "float[n, 3, 32, 32] x"
    softmax = "{ f = Flatten(x)  y = Softmax(f) }"
    assert guessed(f"({image}) => (float[n, 3072] y) {softmax}").task == "classification"
    assert guessed(f"({image}) => (float[n, 3072] image_embeds) {{ image_embeds = Flatten(x) }}").task == "embedding"
    detector = f"({image}) => (float[n, 10, 96] s, float[n, 10, 4] bbox) {{ s = Identity(x)  bbox = Identity(x) }}"
    assert guessed(detector).task == "detection"
    steps = f"({image}) => (float[n, 7, 40] y) {{ y = Softmax(x) }}"
    found = guessed(steps)
    assert (found.task, found.output, found.characters) == ("recognition", "y", None)
    characters = "abcdefghijklmnopqrstuvwxyz0123456789.,"
    named = guessed(steps, properties={"character": "\n".join(characters)})
    assert (named.task, named.characters) == ("recognition", (*characters, " "))
    assert guessed(f"({image}) => (float[n, 3, 32, 32] y) {{ y = Tanh(x) }}").task == "generic"


def test_metadata_says_it() -> None:
    text = "(float[n, 3, 32, 32] x) => (float[n, 22, 10] y) { y = Identity(x) }"
    found = guessed(text, properties={"task": "detect", "names": "{0: 'a, b: c', 1: 'd', 2: 'e'}"})
    assert (found.task, found.classes) == ("detection", 3)


def test_texts() -> None:
    table = f"<float[3, 8] table = {{{', '.join(map(str, range(24)))}}}>"
    text = "(int64[n, s] input_ids) => ({}) TABLE {{ h = Gather(table, input_ids)  {} }}"
    text = text.replace("TABLE", table.replace("{", "{{").replace("}", "}}"))
    assert guessed(text.format("float[n, s, 8] h", "")).output == "h"
    pooled = guessed(text.format("float[n, 8] sentence_embedding", "sentence_embedding = ReduceMax<axes = [1]>(h)"))
    assert (pooled.task, pooled.output) == ("embedding", "sentence_embedding")
    scores = guessed(text.format("float[n, 8] logits", "logits = ReduceMax<axes = [1]>(h)"))
    assert (scores.task, scores.output) == ("classification", "logits")
    # Scores of each token are no states to average.
    assert guessed(text.format("float[n, s, 8] logits", "logits = Identity(h)")).task == "generic"


def test_one_score() -> None:
    sure = guessed("(float[n, 4] x) => (float[n, 1] y) { m = ReduceMax<axes = [1]>(x)  y = Sigmoid(m) }")
    assert (sure.task, sure.reason) == ("classification", "one output of one score ('y')")
    assert guessed("(float[n, 4] x) => (float[n, 1] y) { y = ReduceMax<axes = [1]>(x) }").task == "generic"


def test_a_task_that_is_given() -> None:
    text = "(float[n, 3, 32, 32] x) => (float[n, 3072] y) { f = Flatten(x)  y = Softmax(f) }"
    assert guessed(text, "classification").output == "y"
    assert guessed(text, "generic").task == "generic"
    assert guessed(text, "embedding").output == "y"
    assert guessed(text, "recognition").output is None
    assert guessed(text, "detection").reason == "this task given"


@pytest.mark.real
@pytest.mark.parametrize("key", list(REAL))
def test_real_models(key: str) -> None:
    found = guess_task(load(catalogue.fetch(key)))
    assert (found.task, found.output) == REAL[key]
