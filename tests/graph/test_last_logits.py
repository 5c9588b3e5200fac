"""Logits of the last position alone: equal to the last row of before, in every spelling of a head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from exactness import parse_weighted, random_feeds, reference_outputs, to_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_decoders import decoder
from tiny_transformers import exported, exported_cached, feeds

from graphopt import Generator, perplexity
from graphopt.errors import InputDataError, ModelError
from graphopt.graph.last_logits import last_logits
from graphopt.graph.load import load
from graphopt.graph.save import save

SIZES = {"batch": 2, "sequence": 5}

NORM = """
  two = Constant<value_float = 2.0>()
  last_axis = Constant<value_ints = [-1]>()
  square = Pow(x, two)
  mean = ReduceMean<keepdims = 1>(square, last_axis)
  small = Constant<value_float = 0.00001>()
  raised = Add(mean, small)
  root = Sqrt(raised)
  inverse = Reciprocal(root)
  normal = Mul(x, inverse)
  n = Mul(gain, normal)
"""

FLAT = """
  n = LayerNormalization<axis = -1>(x, gain, bias)
  joined = Constant<value_ints = [-1, 16]>()
  rows = Reshape(n, joined)
  products = Gemm<transB = 1>(rows, head_t, head_bias)
  sizes = Shape<start = 0, end = 2>(n)
  width = Constant<value_ints = [33]>()
  apart = Concat<axis = 0>(sizes, width)
  logits = Reshape(products, apart)
"""

HEADS = {
    "rms norm spelled out": NORM + "logits = MatMul(n, head)",
    "tied": "n = RMSNormalization<axis = 2>(x, gain)\nw = Transpose<perm = [1, 0]>(embedding)\nlogits = MatMul(n, w)",
    "bias and softcap": """
      n = LayerNormalization<axis = -1>(x, gain, bias)
      c = MatMul(n, head)
      b = Add(head_bias, c)
      cap = Constant<value_float = 30.0>()
      d = Div(b, cap)
      t = Tanh(d)
      logits = Mul(t, cap)""",
    "gemm over joined rows": FLAT,
    "a part of the vocabulary": """
      n = RMSNormalization(x, gain)
      wide = MatMul(n, head)
      zero = Constant<value_ints = [0]>()
      end = Constant<value_ints = [33]>()
      axis = Constant<value_ints = [2]>()
      logits = Slice(wide, zero, end, axis)""",
    "all positions asked for": """
      n = RMSNormalization(x, gain)
      zero = Constant<value_ints = [0]>()
      end = Constant<value_ints = [9223372036854775807]>()
      axis = Constant<value_ints = [1]>()
      all = Slice(n, zero, end, axis)
      logits = MatMul(all, head)""",
    "two products side by side": """
      a = MatMul(x, head)
      b = MatMul(x, head_2)
      logits = Add(a, b)""",
    "low rank beside": """
      n = RMSNormalization(x, gain)
      whole = MatMul(n, head)
      a = MatMul(n, down)
      b = MatMul(a, up)
      logits = Add(whole, b)""",
    "two halves of a head": """
      n = RMSNormalization(x, gain)
      a = MatMul(n, left)
      b = MatMul(n, right)
      logits = Concat<axis = -1>(a, b)""",
    "log probabilities": "a = MatMul(x, head)\nlogits = LogSoftmax(a)",
}


def model(head: str, outputs: str = "", opset: int = 23) -> ir.Model:
    """A stream of residuals and a head; the names that nobody makes are random weights."""
    shapes = {
        "embedding": "33, 16", "mixer": "16, 16", "gain": "16", "bias": "16", "head": "16, 33", "head_2": "16, 33",
        "head_t": "33, 16", "head_bias": "33", "down": "16, 3", "up": "3, 33", "left": "16, 20", "right": "16, 13",
    }  # fmt: skip
    used = "embedding mixer " + head
    declared = ", ".join(f"float[{shape}] {name}" for name, shape in shapes.items() if name in used.replace(",", " "))
    return parse_weighted(
        f"""<ir_version: 10, opset_import: ["": {opset}]>
        g (int64[batch, sequence] input_ids) => (float[batch, sequence, 33] logits{outputs})
        <{declared}> {{
          h = Gather(embedding, input_ids)
          m = MatMul(h, mixer)
          x = Add(h, m)
          {head}
        }}"""
    )


def assert_last(before: ir.Model, dims: dict[str, int] = SIZES) -> ir.Model:
    """Cut a copy of a model, and hold its logits to the last row of before, and all other outputs to be the same."""
    after = before.clone()
    last_logits(after)
    onnx.checker.check_model(ir.to_proto(after), full_check=True)
    text = ir.to_proto(after).SerializeToString(deterministic=True)
    last_logits(after)
    assert ir.to_proto(after).SerializeToString(deterministic=True) == text, "a second time changed something"
    feeds = random_feeds(before, dims=dims)
    expected = reference_outputs(to_float64(before), feeds)
    found = reference_outputs(to_float64(after), feeds)
    for value, e, f in zip(after.graph.outputs, expected, found, strict=True):
        wanted = e[:, -1:] if value.name == "logits" else e
        assert f.shape == wanted.shape
        np.testing.assert_allclose(f, wanted, rtol=1e-12, atol=1e-12 * np.abs(wanted).max())
    logits = after.graph.outputs[0]
    assert logits.shape is not None
    assert logits.shape[1] == 1
    return after


def cut(after: ir.Model) -> str | None:
    """The name of the value that the last position is taken of."""
    found = [n for n in after.graph if n.op_type == "Slice" and (n.inputs[1].name or "").endswith("/start")]
    assert len(found) == 1
    return found[0].inputs[0].name


@pytest.mark.parametrize("name", HEADS)
def test_the_stream_is_cut_before_the_head(name: str) -> None:
    after = assert_last(model(HEADS[name]))
    # Before the final norm, and behind the last sum of the stream; the Shape of n, where one is read, keeps n whole.
    assert cut(after) == ("n" if "Shape" in HEADS[name] else "x")
    assert_last(model(HEADS[name]), {"batch": 1, "sequence": 1})


def test_a_second_product_is_left_to_all_positions() -> None:
    assert cut(assert_last(model("n = Relu(x)\na = MatMul(n, down)\nt = Tanh(a)\nlogits = MatMul(t, up)"))) == "a"


def test_old_opsets() -> None:
    head = NORM.replace("last_axis = Constant<value_ints = [-1]>()", "").replace(
        "ReduceMean<keepdims = 1>(square, last_axis)", "ReduceMean<keepdims = 1, axes = [2]>(square)"
    )
    assert cut(assert_last(model(head + "logits = MatMul(n, head)", opset=13))) == "x"


def test_a_hidden_state_that_is_given_out_stays_whole() -> None:
    head = "n = RMSNormalization(x, gain)\nlogits = MatMul(n, head)"
    after = assert_last(model(head, outputs=", float[batch, sequence, 16] n"))
    assert cut(after) == "n"
    assert cut(assert_last(model(head, outputs=", float[batch, sequence, 16] x"))) == "x"


def test_a_value_that_others_read_stays_whole() -> None:
    head = "n = RMSNormalization(x, gain)\nlogits = MatMul(n, head)\nother = MatMul(n, down)"
    after = assert_last(model(head, outputs=", float[batch, sequence, 3] other"))
    assert cut(after) == "n"


STEPS = (
    "{o} = Relu({i})", "{o} = Mul({i}, gain)", "{o} = Add(bias, {i})", "{o} = MatMul({i}, mixer)",
    "{o} = LayerNormalization({i}, gain, bias)", "{o} = Softmax<axis = -1>({i})", "{o} = Mul({i}, {i})",
    "s{o} = Sigmoid({i})\n{o} = Mul({i}, s{o})", "{o} = Sub({i}, x)", "{o} = Identity({i})",
    "m{o} = ReduceMax<keepdims = 1>({i}, last_axis)\n{o} = Sub({i}, m{o})",
    "a{o} = MatMul({i}, mixer)\nb{o} = Tanh({i})\n{o} = Add(a{o}, b{o})",
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(STEPS), max_size=6), st.lists(st.sampled_from(STEPS), max_size=3))
def test_whatever_works_row_by_row_may_stand_before_and_behind(before: list[str], behind: list[str]) -> None:
    lines, name = ["last_axis = Constant<value_ints = [-1]>()"], "x"
    for index, step in enumerate([*before, "{o} = MatMul({i}, head_square)", *behind]):
        lines.append(step.format(i=name, o=f"v{index}"))
        name = f"v{index}"
    text = "\n".join(lines).replace("head_square", "mixer")
    text += f"\nlogits = MatMul({name}, head)"
    assert_last(model(text))


# ---- what isn't understood


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (
            "t = Transpose<perm = [1, 0, 2]>(x)\nu = MatMul(t, head)\nlogits = Transpose<perm = [1, 0, 2]>(u)",
            "Transpose",
        ),
        ("one = Constant<value_ints = [1]>()\nc = CumSum(x, one)\nlogits = Pad(c, pads)", "Pad"),
        ("a = MatMul(x, head)\nlogits = Softmax<axis = 1>(a)", "Softmax"),
        ("a = MatMul(x, head)\ny = Transpose<perm = [0, 2, 1]>(x)\nz = MatMul(x, y)\nlogits = MatMul(z, a)", "MatMul"),
    ],
)
def test_a_head_that_mixes_positions_is_refused(head: str, message: str) -> None:
    if "pads" in head:
        head = "pads = Constant<value_ints = [0, 0, 0, 0, 0, 17]>()\n" + head
    before = model(head)
    text = ir.to_proto(before).SerializeToString(deterministic=True)
    with pytest.raises(ModelError, match=f"the head that makes the logits 'logits' isn't found: {message} "):
        last_logits(before)
    assert ir.to_proto(before).SerializeToString(deterministic=True) == text


def test_logits_that_are_no_rows_of_positions_are_refused() -> None:
    pooled = parse_weighted(
        """<ir_version: 10, opset_import: ["": 23]>
        g (float[batch, 4] x) => (float[batch, 3] logits) <float[4, 3] w> { logits = MatMul(x, w) }"""
    )
    with pytest.raises(ModelError, match="have 2 dimensions"):
        last_logits(pooled)
    pooled.graph.outputs[0].name = "scores"
    with pytest.raises(ModelError, match="no output of the model is recognised as its logits"):
        last_logits(pooled)


def test_logits_that_are_read_again_are_refused() -> None:
    before = model(
        "logits = MatMul(x, head)\nprobabilities = Softmax(logits)", ", float[batch, sequence, 33] probabilities"
    )
    with pytest.raises(ModelError, match=r"the logits 'logits' are read by Softmax \(.*\) too"):
        last_logits(before)


def test_old_models_without_a_dynamic_slice_are_refused() -> None:
    with pytest.raises(ModelError, match="need opset 10 or newer, and this model has 9"):
        last_logits(model("logits = MatMul(x, head)", opset=9))


# ---- decoders


@pytest.mark.parametrize("kind", ["group-query", "attention", "concat"])
def test_a_decoder_writes_the_same_text(kind: str, tmp_path: Path) -> None:
    proto = decoder(kind, positions=kind != "group-query")
    onnx.save(proto, tmp_path / "all.onnx")
    cut_model = load(tmp_path / "all.onnx")
    last_logits(cut_model)
    save(cut_model, tmp_path / "last.onnx")
    whole, last = Generator(tmp_path / "all.onnx"), Generator(tmp_path / "last.onnx")
    prompt = [1, 2, 3, 4, 5, 6, 7]
    for chunk in (512, 3, 1):
        assert last.generate([prompt], max_new_tokens=8, chunk=chunk) == whole.generate([prompt], max_new_tokens=8)
    same = [[1, 2, 3], [4, 5, 6]]
    assert last.generate(same, max_new_tokens=4) == whole.generate(same, max_new_tokens=4)
    assert last.start(1, 7).feed(np.array([prompt])).shape == (1, 1, 41)
    with pytest.raises(InputDataError, match=r"gives logits for the last token only, so it can't score a text\.$"):
        perplexity(last, prompt, window=7)


def test_prompts_of_several_lengths(tmp_path: Path) -> None:
    prompts = [[1, 2, 3, 4, 5], [6, 7]]
    for kind, message in (("concat", r"pad on the left\.$"), ("group-query", r"give prompts of one length\.$")):
        onnx.save(decoder(kind, positions=kind == "concat"), tmp_path / "all.onnx")
        cut_model = load(tmp_path / "all.onnx")
        last_logits(cut_model)
        save(cut_model, tmp_path / f"{kind}.onnx")
        whole, last = Generator(tmp_path / "all.onnx"), Generator(tmp_path / f"{kind}.onnx")
        with pytest.raises(InputDataError, match=message):
            last.generate(prompts, padding="right", max_new_tokens=2)
        if kind == "concat":
            expected = whole.generate(prompts, max_new_tokens=4)
            assert last.generate(prompts, padding="left", max_new_tokens=4) == expected


@pytest.mark.export
@pytest.mark.parametrize(
    ("name", "exporter"),
    [("llama", "dynamo"), *((name, "torchscript") for name in ("gemma2", "opt", "gpt2", "neox"))],
)
def test_what_torch_exports(name: str, exporter: str, tmp_path: Path) -> None:
    before = load(exported(name, exporter))
    before.graph.outputs[0].name = "logits"
    after = before.clone()
    last_logits(after)
    assert len(list(after.graph)) == len(list(before.graph)) + 1
    results = []
    for stem, model_ in (("before", before), ("after", after)):
        save(model_, tmp_path / f"{stem}.onnx")
        results.append(onnxruntime.InferenceSession(tmp_path / f"{stem}.onnx").run(["logits"], feeds(name))[0])
    expected, found = results
    assert found.shape == (2, 1, expected.shape[-1])
    np.testing.assert_allclose(found, expected[:, -1:], rtol=1e-5, atol=1e-5)


@pytest.mark.export
def test_a_decoder_with_a_cache_that_torch_exports(tmp_path: Path) -> None:
    path = exported_cached("llama", "torchscript")
    cut_model = load(path)
    last_logits(cut_model)
    save(cut_model, tmp_path / "last.onnx")
    prompt = [5, 8, 13, 21]
    assert Generator(tmp_path / "last.onnx").generate([prompt]) == Generator(path).generate([prompt])
