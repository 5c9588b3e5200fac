"""Each measure on numbers made by hand: perfect where nothing changed, and what the formula says where something did."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from graphopt.errors import InputDataError, VerificationError
from graphopt.verification.quality.classification import ClassificationMeasure, probabilities
from graphopt.verification.quality.embedding import EmbeddingMeasure, pooled, ranked, spearman
from graphopt.verification.quality.generic import GenericMeasure, cosine_of, relative_error
from graphopt.verification.quality.metrics import Quality
from graphopt.verification.quality.recognition import RecognitionMeasure, ctc, edits
from graphopt.verification.quality.runs import Array, Measure

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no failure."""


RNG = np.random.default_rng(0)


def judged(measure: Measure, *batches: tuple[Array, Array], name: str = "y", **feeds: Array) -> Quality:
    for expected, found in batches:
        measure.add(feeds, {name: expected}, {name: found})
    return measure.quality()


# ---- embedders


def test_embeddings() -> None:
    vectors = RNG.normal(size=(6, 8)).astype(np.float32)
    same = judged(EmbeddingMeasure("y"), (vectors[:4], vectors[:4]), (vectors[4:], vectors[4:]))
    assert (same["spearman"], same["cosine"], same["min_cosine"]) == (1.0, 1.0, 1.0)
    assert same.samples == "6 samples, 15 pairs"
    # A longer vector points the same way, and a turned space keeps all similarities.
    rotation = np.linalg.qr(RNG.normal(size=(8, 8)))[0]
    turned = judged(EmbeddingMeasure("y"), (vectors, 3 * vectors @ rotation))
    assert turned["spearman"] == pytest.approx(1)
    assert turned["cosine"] < 0.9
    one = vectors.copy()
    one[0] = -one[0]
    flipped = judged(EmbeddingMeasure("y"), (vectors, one))
    assert flipped["min_cosine"] == pytest.approx(-1)
    assert flipped["cosine"] == pytest.approx(4 / 6)
    assert flipped["spearman"] < 0.9
    with pytest.raises(InputDataError, match="at least 3 samples, and there are 2"):
        judged(EmbeddingMeasure("y"), (vectors[:2], vectors[:2]))
    with pytest.raises(VerificationError, match=r"shape \[6, 7\] in the candidate and \[6, 8\]"):
        judged(EmbeddingMeasure("y"), (vectors, vectors[:, :7]))


def test_hidden_states_are_averaged_over_the_tokens_that_count() -> None:
    hidden = RNG.normal(size=(2, 3, 4))
    mask = np.array([[1, 1, 0], [1, 1, 1]])
    assert np.allclose(pooled(hidden, mask)[0], hidden[0, :2].mean(axis=0))
    assert np.allclose(pooled(hidden, None), hidden.mean(axis=1))
    # What stands at padding counts for nothing.
    garbage = np.where(mask[:, :, None] == 0, 1e6, hidden)
    assert np.allclose(pooled(garbage, mask), pooled(hidden, mask))
    measure = EmbeddingMeasure("y", "mask")
    for number in range(2):
        measure.add({"mask": mask}, {"y": hidden + number}, {"y": garbage + number})
    assert measure.quality()["cosine"] == pytest.approx(1)
    with pytest.raises(InputDataError, match="An embedding has the shape"):
        pooled(np.zeros((1, 2, 3, 4)), None)


def test_broken_embeddings_have_no_numbers() -> None:
    vectors = RNG.normal(size=(4, 8))
    broken = vectors.copy()
    broken[1, 2] = np.nan
    found = judged(EmbeddingMeasure("y"), (vectors, broken))
    assert math.isnan(found["spearman"])
    assert math.isnan(found["cosine"])
    zero = judged(EmbeddingMeasure("y"), (vectors, 0 * vectors))
    assert zero["cosine"] == 0
    assert math.isnan(zero["spearman"])


@CALM
@given(st.lists(st.integers(-5, 5), min_size=3, max_size=20))
def test_ranks_have_the_mean_of_ties(values: list[int]) -> None:
    array = np.array(values, dtype=np.float64)
    expected = [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]
    assert ranked(array).tolist() == expected


@CALM
@given(arrays(np.float64, (2, 7), elements=st.floats(-100, 100), unique=True))
def test_rank_correlation_only_sees_the_order(pair: np.ndarray) -> None:
    a, b = pair
    found = spearman(a, b)
    assert -1 <= found <= 1
    assert spearman(a, a) == pytest.approx(1)
    assert spearman(a, -a) == pytest.approx(-1)
    order = np.argsort(np.argsort(b)).astype(np.float64)
    assert spearman(a, np.exp(order)) == pytest.approx(found)


# ---- classifiers


def test_classes() -> None:
    scores = np.array([[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.2, 0.3, 0.5]])
    same = judged(ClassificationMeasure("y", [0, 1, 1]), (scores, scores))
    assert [m.name for m in same.metrics] == ["accuracy", "top1", "score", "score_error"]
    assert (same["top1"], same["score"], same["score_error"]) == (1.0, 1.0, 0.0)
    assert same["accuracy"] == same.metric("accuracy").reference == pytest.approx(2 / 3)
    changed = scores.copy()
    changed[0] = [0.4, 0.6, 0.0]
    found = judged(ClassificationMeasure("y", [0, 1, 1]), (scores[:2], changed[:2]), (scores[2:], changed[2:]))
    assert found["top1"] == pytest.approx(2 / 3)
    assert found["accuracy"] == pytest.approx(1 / 3)
    assert found["score_error"] == pytest.approx(0.5)
    assert found["score"] == pytest.approx(1 - 0.5 / 3)
    assert "accuracy" not in [m.name for m in judged(ClassificationMeasure("y"), (scores, scores)).metrics]


def test_logits_are_read_as_probabilities() -> None:
    logits = RNG.normal(size=(5, 4)) * 3
    exact = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert np.allclose(probabilities(logits, "logits"), exact)
    noisy = logits + RNG.normal(size=logits.shape) * 0.1
    by_logits = judged(ClassificationMeasure("y"), (logits, noisy))
    by_scores = judged(ClassificationMeasure("y"), (exact, probabilities(noisy, "logits")))
    for name in ("top1", "score", "score_error"):
        assert by_logits[name] == pytest.approx(by_scores[name])
    assert judged(ClassificationMeasure("y"), (logits, logits + 5))["score"] == pytest.approx(1)


def test_one_class_against_the_rest() -> None:
    scores, changed = np.array([[0.2], [0.9]]), np.array([[0.6], [0.9]])
    found = judged(ClassificationMeasure("y", [0, 1]), (scores, changed))
    assert (found["top1"], found["accuracy"], found.metric("accuracy").reference) == (0.5, 0.5, 1.0)
    assert found["score_error"] == pytest.approx(0.4)
    assert found["score"] == pytest.approx(0.8)


def test_a_broken_classifier_is_never_right() -> None:
    scores = np.array([[0.9, 0.1]])
    found = judged(ClassificationMeasure("y", [0]), (scores, scores * np.nan))
    assert (found["top1"], found["accuracy"]) == (0, 0)
    assert math.isnan(found["score"])
    assert math.isnan(found["score_error"])


@CALM
@given(arrays(np.float64, (2, 3, 4), elements=st.floats(-30, 30)))
def test_score_agreement_is_a_share(logits: np.ndarray) -> None:
    found = judged(ClassificationMeasure("y", scores="logits"), (logits[0], logits[1]))
    assert -1e-9 <= found["score"] <= 1 + 1e-9
    back = judged(ClassificationMeasure("y", scores="logits"), (logits[1], logits[0]))
    assert back["score"] == pytest.approx(found["score"])


def test_wrong_labels() -> None:
    scores = np.array([[0.9, 0.1], [0.4, 0.6]])
    with pytest.raises(InputDataError, match="There are 1 labels for more samples"):
        judged(ClassificationMeasure("y", [0]), (scores, scores))
    with pytest.raises(InputDataError, match="A label is 2, but the classes are 0 to 1"):
        judged(ClassificationMeasure("y", [0, 2]), (scores, scores))


# ---- recognisers


def steps(text: str, letters: str, blank: int = 0) -> np.ndarray:
    """Scores [1, steps, classes] that spell a text: each letter twice, with a blank behind it."""
    classes: list[int] = []
    for letter in text:
        number = letters.index(letter) + (letters.index(letter) >= blank)
        classes += [number, number, blank]
    return np.eye(len(letters) + 1)[classes][None]


@pytest.mark.parametrize("blank", [0, 3])
def test_texts(blank: int) -> None:
    letters = "ab "
    ours, theirs = steps("ab ba", letters, blank), steps("abbab", letters, blank)
    measure = RecognitionMeasure("y", tuple(letters))
    same = judged(measure, (ours, ours))
    assert (same["cer"], same.metric("cer").reference) == (0, 0)
    assert same.samples == "5 characters in 1 sample"
    found = judged(RecognitionMeasure("y", tuple(letters)), (ours, theirs))
    assert found["cer"] == 2 / 5  # the space goes, a letter comes
    assert judged(RecognitionMeasure("y"), (ours, theirs))["cer"] == 2 / 5
    spaceless = judged(RecognitionMeasure("y", tuple(letters), ignore_spaces=True), (ours, theirs))
    assert spaceless["cer"] == 1 / 4
    truth = judged(RecognitionMeasure("y", tuple(letters), ["aa ba"]), (ours, theirs))
    assert truth.metric("cer").reference == 1 / 5
    assert truth["cer"] == 3 / 5
    assert truth["change"] == 2 / 5


def test_wrong_texts() -> None:
    ours = steps("ab", "ab ")
    with pytest.raises(InputDataError, match="class 2, and only 2 are known"):
        judged(RecognitionMeasure("y", ("a", "b")), (steps("a ", "ab "), ours))
    with pytest.raises(InputDataError, match="There are 0 true texts"):
        judged(RecognitionMeasure("y", tuple("ab "), []), (ours, ours))
    with pytest.raises(InputDataError, match="characters of the model's classes must be known"):
        RecognitionMeasure("y", None, ["a"])
    with pytest.raises(VerificationError, match=r"it must be \[batch, steps, characters\]"):
        judged(RecognitionMeasure("y"), (ours, ours[:, :, :-1]))


def test_repeated_letters() -> None:
    assert ctc(np.eye(3)[[1, 1, 0, 1, 2, 2, 1, 0, 0]], 0) == [1, 1, 2, 1]


@CALM
@given(st.text("abc", max_size=8), st.text("abc", max_size=8))
def test_edits(a: str, b: str) -> None:
    table = [[max(i, j) if 0 in (i, j) else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = min(table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (x != y))
    assert edits(a, b) == table[-1][-1]
    assert (edits(a, b) == 0) == (a == b)


# ---- any model


def test_any_outputs() -> None:
    expected = {"a": np.array([[1.0, 0.0]]), "b": np.array([10, 20])}
    found = {"a": np.array([[1.0, 1.0]]), "b": np.array([10, 21])}
    measure = GenericMeasure()
    measure.add({}, expected, expected)
    assert (measure.quality()["cosine"], measure.quality()["error"]) == (1, 0)
    measure.add({}, expected, found)
    quality = measure.quality()
    assert quality["cosine"] == pytest.approx(math.sqrt(0.5))
    assert quality["error"] == 1
    assert {name: metrics[1].value for name, metrics in quality.outputs} == {"a": 1, "b": 1 / 20}
    assert quality.samples == "2 batches"
    assert quality.to_dict()["outputs"]["b"][1]["value"] == 1 / 20
    broken = GenericMeasure()
    broken.add({}, expected, {**expected, "a": np.array([[np.nan, 0.0]])})
    assert math.isnan(broken.quality()["cosine"])
    assert math.isnan(broken.quality()["error"])
    with pytest.raises(KeyError):
        quality["ppl"]


def test_cosine_and_error_of_nothing() -> None:
    zero, one = np.zeros(2), np.ones(2)
    assert cosine_of(zero, zero) == 1
    assert cosine_of(zero, one) == 0
    assert relative_error(zero, zero) == 0
    assert relative_error(zero, one) == math.inf
