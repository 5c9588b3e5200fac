"""From files to quality: every form of data, what doesn't fit, and what was calibrated with."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_decoders import VOCABULARY, decoder

import graphopt
from graphopt.calibration.text import TextDataset
from graphopt.errors import InputDataError, ModelError, UsageError, VerificationError
from graphopt.evaluation.data import EvaluationData, load_evaluation
from graphopt.evaluation.feeds import array_batches, encoder_feeds
from graphopt.evaluation.judging import Options, evaluate, prepare

CLASSIFIER = """<ir_version: 8, opset_import: ["": 17]>
g (float[n, 3] x) => (float[n, 3] probabilities) <float[3, 3] w = {1, 0, 0, 0, BIG, 0, 0, 0, 1}> {
  y = MatMul(x, w)  probabilities = Softmax(y)
}"""
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "b", "c", "d", "e", "f", "g")


def save(text: str, path: Path) -> Path:
    onnx.save(onnx.parser.parse_model(text), path)
    return path


@pytest.fixture
def classifier(tmp_path: Path) -> Path:
    return save(CLASSIFIER.replace("BIG", "1"), tmp_path / "classifier.onnx")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """Words as tokens, with a beginning and an end around each text."""
    made = pytest.importorskip("tokenizers")
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    words = made.Tokenizer(made.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = made.pre_tokenizers.Whitespace()
    words.post_processor = made.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    words.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


ENCODER = """<ir_version: 8, opset_import: ["": 17]>
g (int64[n, s] input_ids, int64[n, s] token_type_ids, int64[n, s] attention_mask) => (float[n, s, 2] hidden)
<float[11, 2] table = {0, 1, 1, 0, 2, 1, 1, 3, 4, 1, 1, 5, 2, 2, 3, 1, 1, 1, 0, 2, 5, 5}, float[2, 2] types = {0, 0, 9, 9}> {
  a = Gather(table, input_ids)  b = Gather(types, token_type_ids)  hidden = Add(a, b)
}"""


def test_arrays_with_labels(classifier: Path, tmp_path: Path) -> None:
    rows = np.eye(3, dtype=np.float32)[[0, 1, 2, 1]] * 3
    np.savez(tmp_path / "data.npz", x=rows, labels=np.array([0, 1, 2, 2]))
    other = save(CLASSIFIER.replace("BIG", "0"), tmp_path / "other.onnx")
    same, found = evaluate(classifier, [classifier, other], tmp_path / "data.npz")
    assert same["accuracy"] == 0.75
    assert found["accuracy"] == 0.5
    assert found["top1"] == 0.5
    assert found.samples == "4 samples"
    assert "one output of 3 scores ('probabilities')" in found.notes[0]
    [two] = evaluate(classifier, [other], tmp_path / "data.npz", Options(samples=2, task="classification"))
    assert (two["top1"], two.samples, two.notes) == (0.5, "2 samples", ())
    assert prepare(classifier, tmp_path / "data.npz").metrics == ("accuracy", "top1", "score", "score_error")
    np.savez(tmp_path / "bare.npz", x=rows)
    assert prepare(classifier, tmp_path / "bare.npz").metrics == ("top1", "score", "score_error")
    assert graphopt.evaluate is evaluate


def test_batches(classifier: Path) -> None:
    model = graphopt.load(classifier)
    data = EvaluationData("data", arrays={"x": np.arange(60, dtype=np.float32).reshape(20, 3)})
    assert [len(batch["x"]) for batch in array_batches(data, model, None)] == [8, 8, 4]
    assert [len(batch["x"]) for batch in array_batches(data, model, 9)] == [8, 1]
    fixed = ir.from_proto(
        onnx.parser.parse_model(CLASSIFIER.replace("BIG", "1").replace("float[n, 3] x", "float[2, 3] x"))
    )
    assert [len(batch["x"]) for batch in array_batches(data, fixed, None)] == [2] * 10
    with pytest.raises(InputDataError, match="The model takes 2 samples at once, and data holds 5"):
        array_batches(data, fixed, 5)


def test_arrays_of_different_lengths_are_one_run(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[n] x, float[2] s) => (float[n] y) { t = ReduceSum(s)  u = Squeeze(t)  y = Mul(x, u) }'
    path = save(text, tmp_path / "scaled.onnx")
    data = EvaluationData("data", arrays={"x": np.ones(5, np.float32), "s": np.ones(2, np.float32)})
    [found] = evaluate(path, [path], data)
    assert (found.task, found["error"], found.samples) == ("generic", 0, "1 batch")


def test_sentences(tokenizer: Path, tmp_path: Path) -> None:
    path = save(ENCODER, tmp_path / "encoder.onnx")
    (tmp_path / "text.txt").write_text("a b c\n\n  d e\nf\n")
    [found] = evaluate(path, [path], tmp_path / "text.txt")
    assert found.samples == "3 samples, 3 pairs"
    assert found["spearman"] == pytest.approx(1)
    feeds = list(prepare(path, tmp_path / "text.txt").batches)
    assert [batch["input_ids"].tolist() for batch in feeds] == [[[1, 4, 5, 6, 2]], [[1, 7, 8, 2]], [[1, 9, 2]]]
    assert feeds[0]["attention_mask"].tolist() == [[1] * 5]
    assert feeds[0]["token_type_ids"].tolist() == [[0] * 5]
    assert len(list(prepare(path, tmp_path / "text.txt", Options(samples=2)).batches)) == 2


def test_rows_with_labels(tokenizer: Path, tmp_path: Path) -> None:
    text = ENCODER.replace("float[n, s, 2] hidden", "float[n, 2] logits").replace(
        "hidden = Add(a, b)", "h = Add(a, b)  logits = ReduceMax<axes = [1], keepdims = 0>(h)"
    )
    path = save(text, tmp_path / "classifier.onnx")
    rows = [{"text": "a b", "label": 0}, {"text": "c", "label": 1}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    [found] = evaluate(path, [path], tmp_path / "rows.jsonl")
    assert found.task == "classification"
    assert found.metrics[0].name == "accuracy"


def test_language(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    onnx.save(decoder("concat"), path)
    words = " ".join(np.random.default_rng(0).choice(WORDS[4:], 200))
    (tmp_path / "text.txt").write_text(words)
    [found] = evaluate(path, [path], tmp_path / "text.txt", Options(window=32, samples=2))
    assert found.samples == "62 tokens in 2 windows of 32"
    assert found["kl"] == 0
    with pytest.raises(UsageError, match=r"judged on text, and .* holds none"):
        evaluate(path, [path], EvaluationData("arrays", arrays={"x": np.zeros(3)}))
    ids = np.arange(400) % (VOCABULARY - 4)
    [words_ids] = [prepare(path, tmp_path / "text.txt", Options(window=32)).token_ids]
    assert words_ids is not None
    calibration = TextDataset(np.concatenate([ids[:100], words_ids]), 32)
    with pytest.raises(InputDataError, match="with the calibration text"):
        prepare(path, tmp_path / "text.txt", Options(window=32), calibration)
    # A part of the calibration text that no window uses isn't calibrated with.
    prepare(path, tmp_path / "text.txt", Options(window=32), TextDataset(np.concatenate([ids, words_ids])[:450], 400))


class Given:
    """Samples as calibration has them."""

    def __init__(self, *batches: np.ndarray) -> None:
        self.batches = batches

    def feeds(self, model: ir.Model) -> Iterator[dict[str, np.ndarray]]:
        for batch in self.batches:
            yield {"x": batch}


def test_samples_that_were_calibrated_with(classifier: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    data = EvaluationData("samples", samples=Given(rows[:2], rows[2:4]))
    [found] = evaluate(classifier, [classifier], data, calibration=Given(rows[4:]))
    assert found.samples == "4 samples"
    [one] = evaluate(classifier, [classifier], data, Options(samples=1))
    assert one.samples == "2 samples"
    with pytest.raises(InputDataError, match="1 of the 4 samples to judge with were calibrated with"):
        evaluate(classifier, [classifier], data, calibration=Given(rows[3:]))


def test_sentences_that_were_calibrated_with(tokenizer: Path, tmp_path: Path) -> None:
    path = save(ENCODER, tmp_path / "encoder.onnx")
    sentences = [" ".join(np.random.default_rng(seed).choice(WORDS[4:], 20)) for seed in range(4)]
    data = EvaluationData("sentences", rows=tuple(sentences))
    ids = [WORDS.index(word) for word in sentences[3].split()]
    with pytest.raises(InputDataError, match="shares 20 of its 20 tokens"):
        prepare(path, data, calibration=TextDataset(np.array([4, *ids, 4, 4, 4]), 24))
    prepare(path, data, calibration=TextDataset(np.array([4, *ids[::-1], 4, 4, 4]), 24))


def test_candidates_that_cannot_be_judged(classifier: Path, tmp_path: Path) -> None:
    data = EvaluationData("data", arrays={"x": np.eye(3, dtype=np.float32)})
    renamed = save(CLASSIFIER.replace("BIG", "1").replace("probabilities", "p"), tmp_path / "renamed.onnx")
    with pytest.raises(VerificationError, match="has no output 'probabilities'"):
        evaluate(classifier, [renamed], data)
    text = CLASSIFIER.replace("BIG", "1").replace("float[n, 3] x", "float[n, 4] x")
    narrow = save(
        text.replace(
            "float[3, 3] w = {1, 0, 0, 0, 1, 0, 0, 0, 1}", "float[4, 3] w = {1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0}"
        ),
        tmp_path / "narrow.onnx",
    )
    with pytest.raises(VerificationError, match=r"narrow\.onnx doesn't run on x \[3, 3\]"):
        evaluate(classifier, [narrow], data)
    with pytest.raises(ModelError):
        evaluate(classifier, [tmp_path / "none.onnx"], data)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("empty.txt", "\n \n", "There is no text in"),
        ("bad.npz", "text", "is not an .npz file"),
        ("bad.jsonl", "{", "isn't JSON"),
        ("none.txt", None, "can't be read"),
        ("none.npz", None, "can't be read"),
        ("", None, "There is no image in"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | None, sentence: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputDataError, match=sentence):
        load_evaluation(tmp_path / name)


def test_mistakes(classifier: Path, tmp_path: Path) -> None:
    data = EvaluationData("data", arrays={"x": np.eye(3, dtype=np.float32)})
    with pytest.raises(UsageError, match="At least one sample"):
        evaluate(classifier, [], data, Options(samples=0))
    with pytest.raises(UsageError, match="Text needs a tokenizer"):
        evaluate(classifier, [], EvaluationData("text", rows=("a",)))
    with pytest.raises(UsageError, match=r"No output of .* looks like one of a model for recognition"):
        evaluate(classifier, [], data, Options(task="recognition"))
    with pytest.raises(InputDataError, match="'y'"):
        evaluate(classifier, [], EvaluationData("data", arrays={"y": np.eye(3, dtype=np.float32)}))
    with pytest.raises(InputDataError, match=r"rows is text, and no input of the model takes tokens; give an \.npz"):
        encoder_feeds(graphopt.load(classifier), np.arange(3), "rows")
    more = ENCODER.replace("int64[n, s] attention_mask", "int64[n, s] attention_mask, float[n] gain")
    with pytest.raises(InputDataError, match=r"rows is text, which doesn't tell the input 'gain'; give an \.npz"):
        encoder_feeds(graphopt.load(save(more, tmp_path / "more.onnx")), np.arange(3), "rows")
