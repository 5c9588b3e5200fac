"""Data sets: what each feeds, and one sentence for each way in which data doesn't fit a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from tiny_decoders import decoder

from graphopt.calibration.data import ArrayDataset, BatchedDataset, Dataset, load_arrays
from graphopt.calibration.text import TextDataset, generated_text
from graphopt.calibration.token_feeds import TokenAxes
from graphopt.errors import InputDataError, UsageError
from graphopt.runtime_ops.memory_session import make_session, run

TWO = """<ir_version: 10, opset_import: ["": 21]>
g (float[n, 3] x, int64[n] i) => (float[n, 3] y) { f = Cast<to = 1>(i) u = Unsqueeze(f, one) y = Mul(x, u) }"""

ENCODER = """<ir_version: 10, opset_import: ["": 21]>
g (int64[b, t] input_ids, int64[b, t] attention_mask, int64[b, t] token_type_ids) => (float[b, t, 4] y) {
    w = Gather(words, input_ids) k = Gather(kinds, token_type_ids) x = Add(w, k)
    turned = Transpose<perm = [0, 2, 1]>(x) scores = MatMul(x, turned)
    c = Cast<to = 1>(attention_mask) less = Sub(c, one) bias = Mul(less, many) wide = Unsqueeze(bias, axis)
    masked = Add(scores, wide) p = Softmax(masked) y = MatMul(p, x)
}"""


def two() -> ir.Model:
    proto = onnx.parser.parse_model(TWO)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([1], np.int64), "one"))
    return ir.from_proto(proto)


def encoder() -> ir.Model:
    proto = onnx.parser.parse_model(ENCODER)
    rng = np.random.default_rng(0)
    for name, array in {
        "words": rng.normal(size=(30, 4)), "kinds": rng.normal(size=(2, 4)), "one": 1.0, "many": 1e4,
    }.items():  # fmt: skip
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array, np.float32), name))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray([1], np.int64), "axis"))
    return ir.from_proto(proto)


def test_arrays_are_fed_as_they_are() -> None:
    feeds = [{"x": np.ones((2, 3), np.float32), "i": np.arange(2)} for _ in range(3)]
    data = ArrayDataset(iter(feeds))
    assert len(data) == 3
    for _ in range(2):
        assert [{k: v.tolist() for k, v in one.items()} for one in data.feeds(two())] == [
            {"x": [[1, 1, 1], [1, 1, 1]], "i": [0, 1]}
        ] * 3


@pytest.mark.parametrize(
    ("feed", "says"),
    [
        ({"x": np.ones((2, 3), np.float32)}, "The input 'i' is missing"),
        ({"x": np.ones((2, 3), np.float32), "i": np.arange(2), "z": 1}, "no input 'z'"),
        ({"x": np.ones((2, 3)), "i": np.arange(2)}, "The input 'x' takes float32, .* float64"),
        ({"x": np.ones((2, 4), np.float32), "i": np.arange(2)}, r"'x' takes the shape \[any, 3\], .* \[2, 4\]"),
        ({"x": np.ones((2, 3, 1), np.float32), "i": np.arange(2)}, "'x' takes the shape"),
    ],
)
def test_arrays_that_do_not_fit(feed: dict[str, np.ndarray], says: str) -> None:
    with pytest.raises(InputDataError, match=says):
        list(ArrayDataset([feed]).feeds(two()))


def test_no_samples() -> None:
    with pytest.raises(UsageError, match="no sample"):
        ArrayDataset([])
    with pytest.raises(UsageError, match="must be a mapping"):
        ArrayDataset([np.ones(3)])  # type: ignore[list-item]


def test_npz(tmp_path: Path) -> None:
    x = np.arange(30, dtype=np.float32).reshape(10, 3)
    np.savez(tmp_path / "a.npz", x=x, i=np.arange(10))
    data = load_arrays(tmp_path / "a.npz", batch=4)
    assert len(data) == 10
    assert [len(one["i"]) for one in data.feeds(two())] == [4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([one["x"] for one in data.feeds(two())]), x)
    assert len(load_arrays(tmp_path / "a.npz", limit=3)) == 3
    np.savez(tmp_path / "b.npz", x=x, i=np.arange(9))
    with pytest.raises(InputDataError, match="first axis of every array counts the samples"):
        load_arrays(tmp_path / "b.npz")
    (tmp_path / "c.npz").write_text("no")
    with pytest.raises(InputDataError, match=r"not an \.npz file"):
        load_arrays(tmp_path / "c.npz")
    with pytest.raises(InputDataError, match="can't be read"):
        load_arrays(tmp_path / "none.npz")


def test_batches_of_a_fixed_size() -> None:
    model = two()
    for value in model.graph.inputs:
        value.shape = ir.Shape([4, *value.shape[1:]])
    data = BatchedDataset({"x": np.ones((10, 3), np.float32), "i": np.arange(10)})
    assert [len(one["i"]) for one in data.feeds(model)] == [4, 4]
    with pytest.raises(InputDataError, match="takes 4 samples at once"):
        list(BatchedDataset({"x": np.ones((3, 3), np.float32), "i": np.arange(3)}).feeds(model))


def fingerprints() -> list[Dataset]:
    x, i = np.ones((2, 3), np.float32), np.arange(2)
    return [
        ArrayDataset([{"x": x, "i": i}]),
        ArrayDataset([{"x": x * 2, "i": i}]),
        ArrayDataset([{"x": x, "i": i}] * 2),
        BatchedDataset({"x": x, "i": i}),
        TextDataset(np.arange(64), 16),
        TextDataset(np.arange(64), 8),
        TextDataset(np.arange(1, 65), 16),
        TextDataset(np.arange(64), 16, limit=2),
    ]


def test_fingerprints_tell_contents_apart_and_nothing_else() -> None:
    first, again = ([one.fingerprint for one in fingerprints()] for _ in range(2))
    assert first == again
    assert len(set(first)) == len(first)
    # What no window holds doesn't count.
    assert TextDataset(np.arange(70), 16).fingerprint == TextDataset(np.arange(64), 16).fingerprint


@pytest.mark.parametrize("kind", ["group-query", "attention", "concat"])
def test_text_for_a_decoder(kind: str) -> None:
    model = ir.from_proto(decoder(kind, positions=kind == "concat"))  # type: ignore[arg-type]
    data = TextDataset(np.arange(41) % 41, 10, before=(1,), after=(2,))
    feeds = list(data.feeds(model))
    assert len(feeds) == 4
    assert feeds[1]["input_ids"].tolist() == [list(range(10, 20))]
    assert feeds[1]["attention_mask"].tolist() == [[1] * 10]
    assert feeds[1]["past_key_values.0.key"].shape == (1, 2, 0, 16)
    assert ("position_ids" in feeds[0]) == (kind == "concat")
    logits = run(make_session(model), feeds[1])[0]
    assert logits.shape == (1, 10, 41)


def test_text_for_an_encoder() -> None:
    model = encoder()
    data = TextDataset(np.arange(20, dtype=np.int64), 10, before=(28,), after=(29,))
    first, second = data.feeds(model)
    assert first["input_ids"].tolist() == [[28, *range(8), 29]]
    assert second["input_ids"].tolist() == [[28, *range(10, 18), 29]]
    assert first["token_type_ids"].tolist() == [[0] * 10]
    assert first["attention_mask"].tolist() == [[1] * 10]
    with pytest.raises(InputDataError, match="no room"):
        list(TextDataset(np.arange(20), 2, before=(28,), after=(29,)).feeds(model))


def test_text_for_what_takes_none() -> None:
    with pytest.raises(InputDataError, match="none of whose inputs takes token ids"):
        list(TextDataset(np.arange(20), 10).feeds(two()))
    with pytest.raises(InputDataError, match="decoder with a KV cache"):
        generated_text(two())
    model = encoder()
    model.graph.inputs[0].shape = ir.Shape([1, 8])
    with pytest.raises(InputDataError, match=r"'input_ids' takes the shape \[1, 8\]"):
        list(TextDataset(np.arange(20), 10).feeds(model))


def test_which_tokens_count() -> None:
    mask = np.asarray([[1, 1, 1, 1], [0, 1, 1, 1]])
    ids = np.zeros((2, 4), np.int64)
    axes = TokenAxes.read(encoder())
    valid = axes.valid({"input_ids": ids, "attention_mask": mask})
    assert valid is not None
    np.testing.assert_array_equal(valid, mask != 0)
    assert axes.valid({"input_ids": ids, "attention_mask": np.ones_like(mask)}) is None
    decoding = TokenAxes.read(ir.from_proto(decoder("attention")))
    valid = decoding.valid({"input_ids": ids[:, :3], "attention_mask": mask})
    assert valid is None  # padding lies in the past
    assert TokenAxes.read(two()).sizes({"x": ids}) == (0, 0)


def test_a_decoder_writes_its_own_text() -> None:
    model = ir.from_proto(decoder("attention"))
    data = generated_text(model, windows=3, window=6, seed=5)
    assert (len(data), data.window) == (3, 6)
    assert data.tokens.max() < 41
    assert data.fingerprint == generated_text(model, windows=3, window=6, seed=5).fingerprint
    assert data.fingerprint != generated_text(model, windows=3, window=6, seed=6).fingerprint
    with pytest.raises(UsageError, match="at least 2 tokens"):
        generated_text(model, window=1)
