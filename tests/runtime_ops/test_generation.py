"""The generator: every way to run a decoder writes the same text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from tiny_decoders import decoder
from tiny_transformers import cached_model, exported_cached

from graphopt import Generator, Sampling, perplexity, session
from graphopt.errors import InputDataError, ModelError, UsageError
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.load import load
from graphopt.runtime_ops.decoding import bind_shared_cache
from graphopt.runtime_ops.sampling import probabilities
from graphopt.runtime_ops.scoring import scores

PROMPTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("decoders")
    forms = {
        "group-query": decoder("group-query"),
        "half": decoder("group-query", rotary=False, positions=True, dtype="float16"),
        "attention": decoder("attention", positions=True),
        "concat": decoder("concat", positions=True),
        "swapped": decoder("concat", positions=True, layout="BSHD", names="in{}{} out{}{}"),
        "unplaced": decoder("concat"),
    }
    for name, proto in forms.items():
        onnx.save(proto, folder / f"{name}.onnx")
    return folder


def recomputed(generator: Generator, prompt: list[int], new: int) -> list[int]:
    """The same text with an empty cache at every token."""
    row = list(prompt)
    for _ in range(new):
        decoding = generator.start(1, len(row))
        row.append(int(np.argmax(decoding.feed(np.array([row]))[0, -1])))
    return row[len(prompt) :]


@pytest.mark.parametrize("name", ["group-query", "half", "attention", "concat", "swapped"])
def test_growing_static_and_recomputed_are_the_same(folder: Path, name: str) -> None:
    growing = Generator(folder / f"{name}.onnx", cache="growing")
    alone = [recomputed(growing, prompt, 8) for prompt in PROMPTS]
    shared = name in ("group-query", "half")
    generators = [growing, *([Generator(folder / f"{name}.onnx", cache="static")] if shared else [])]
    assert Generator(folder / f"{name}.onnx").cache == ("static" if shared else "growing")
    for generator in generators:
        for prompt, expected in zip(PROMPTS, alone, strict=True):
            assert generator.generate([prompt], max_new_tokens=8) == [expected]
            assert generator.generate([prompt], max_new_tokens=8, chunk=2) == [expected]
        assert generator.generate(PROMPTS, max_new_tokens=8) == alone
        assert generator.generate(PROMPTS, max_new_tokens=8, padding="right") == alone


def test_operators_with_and_without_a_shared_buffer_agree(folder: Path) -> None:
    onnx.save(decoder("concat", positions=True, dtype="float16"), folder / "spelled-out.onnx")
    texts = [Generator(folder / f"{n}.onnx").generate(PROMPTS, max_new_tokens=8) for n in ("half", "spelled-out")]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_where_the_mask_tells_places(folder: Path, padding) -> None:
    generator = Generator(folder / "concat.onnx")
    alone = [generator.generate([p], max_new_tokens=6)[0] for p in PROMPTS]
    assert generator.generate(PROMPTS, max_new_tokens=6, padding=padding) == alone
    assert generator.generate(PROMPTS, max_new_tokens=6, padding=padding, chunk=2) == alone


def test_padding_that_the_model_would_misread_is_refused(folder: Path) -> None:
    with pytest.raises(InputDataError, match="can't take padding on the left: GroupQueryAttention"):
        Generator(folder / "group-query.onnx").generate(PROMPTS, padding="left")
    unplaced = Generator(folder / "unplaced.onnx")
    with pytest.raises(InputDataError, match="counts positions by places in the cache"):
        unplaced.generate(PROMPTS)
    assert len(unplaced.generate(PROMPTS, max_new_tokens=2, padding="left")) == 3
    assert len(unplaced.generate([PROMPTS[0]] * 2, max_new_tokens=2)) == 2  # of one length
    with pytest.raises(InputDataError, match="none may be empty"):
        unplaced.generate([[1], []])
    with pytest.raises(UsageError, match="left or on the right"):
        unplaced.generate([[1]], padding="middle")


def test_stop_tokens_end_a_row_and_the_others_go_on(folder: Path) -> None:
    generator = Generator(folder / "concat.onnx")
    free = generator.generate(PROMPTS, max_new_tokens=8)
    stop = free[0][2]
    rows = generator.generate(PROMPTS, max_new_tokens=8, stop=[stop])
    for row, expected in zip(rows, free, strict=True):
        cut = expected.index(stop) + 1 if stop in expected else 8
        assert row == expected[:cut]
    steps = list(generator.stream(PROMPTS, max_new_tokens=8, stop=[stop]))
    assert [[step[i] for step in steps if step[i] is not None] for i in range(3)] == rows


def test_a_full_cache_says_so(folder: Path) -> None:
    generator = Generator(folder / "group-query.onnx")
    decoding = generator.start(1, 4)
    decoding.feed(np.array([[1, 2, 3]]))
    with pytest.raises(InputDataError, match="holds 4 tokens; 2 more"):
        decoding.feed(np.array([[4, 5]]))


def test_a_loop_of_ones_own_on_shared_buffers(folder: Path) -> None:
    path = folder / "group-query.onnx"
    own, interface = session(path), kv_interface(load(path))
    assert interface is not None
    binding = own.io_binding()
    buffers = bind_shared_cache(own, binding, interface, batch=1, capacity=12)
    assert {tuple(value.shape()) for value in buffers.values()} == {(1, 2, 12, 16)}
    row = list(PROMPTS[0])
    for begin in (0, *range(len(row), len(row) + 5)):
        binding.bind_cpu_input("input_ids", np.array([row[begin:]]))
        binding.bind_cpu_input("attention_mask", np.ones((1, len(row)), np.int64))
        binding.bind_output("logits")
        own.run_with_iobinding(binding)
        (logits,) = (v for v in binding.get_outputs() if v.shape()[-1] == 41)
        row.append(int(logits.numpy()[0, -1].argmax()))
    assert row[5:] == Generator(path).generate([PROMPTS[0]], max_new_tokens=6)[0]
    with pytest.raises(UsageError, match="writes its cache in place"):
        bind_shared_cache(own, binding, kv_interface(load(folder / "concat.onnx")), batch=1, capacity=12)


def test_a_session_of_ones_own(folder: Path) -> None:
    path = folder / "concat.onnx"
    own = Generator(session(path), interface=kv_interface(load(path)))
    assert own.generate(PROMPTS, max_new_tokens=4) == Generator(path).generate(PROMPTS, max_new_tokens=4)
    with pytest.raises(UsageError, match="needs its interface"):
        Generator(session(path))


def test_what_is_no_decoder(folder: Path) -> None:
    with pytest.raises(UsageError, match="joined by Concat"):
        Generator(folder / "concat.onnx", cache="static")
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[b, 4] x) => (float[b, 4] y) { y = Relu(x) }'
    onnx.save(onnx.parser.parse_model(text), folder / "relu.onnx")
    with pytest.raises(ModelError, match="no decoder with a KV cache"):
        Generator(folder / "relu.onnx")
    proto = decoder("concat")
    proto.graph.input.append(onnx.helper.make_tensor_value_info("scale", onnx.TensorProto.FLOAT, [1]))
    proto.graph.node[-1].output[0] = "unscaled"
    proto.graph.node.append(onnx.helper.make_node("Mul", ["unscaled", "scale"], ["logits"]))
    onnx.save(proto, folder / "scaled.onnx")
    with pytest.raises(ModelError, match="the inputs scale are unknown"):
        Generator(folder / "scaled.onnx")
    scaled = Generator(folder / "scaled.onnx", extra={"scale": np.ones(1, np.float32)})
    plain = Generator(folder / "unplaced.onnx")
    assert scaled.generate([[1, 2]], max_new_tokens=4) == plain.generate([[1, 2]], max_new_tokens=4)
    proto.graph.input[-1].name = "encoder_hidden_states"
    proto.graph.node[-1].input[1] = "encoder_hidden_states"
    onnx.save(proto, folder / "crossed.onnx")
    with pytest.raises(ModelError, match="attends to another sequence"):
        Generator(folder / "crossed.onnx")


# ---- sampling


def test_the_same_seed_draws_the_same_text(folder: Path) -> None:
    generator = Generator(folder / "concat.onnx")
    texts = [
        generator.generate(PROMPTS, max_new_tokens=12, sampling=Sampling(temperature=2.0, top_k=20, seed=seed))
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_top_k_and_top_p_cut_what_may_be_drawn() -> None:
    logits = np.log(np.array([[0.5, 0.1, 0.3, 0.1]]))
    assert np.allclose(probabilities(logits, Sampling(1.0)), np.exp(logits))
    assert np.allclose(probabilities(logits, Sampling(1.0, top_k=2)), [[0.625, 0, 0.375, 0]])
    assert np.allclose(probabilities(logits, Sampling(1.0, top_p=0.6)), [[0.625, 0, 0.375, 0]])
    assert np.allclose(probabilities(logits, Sampling(1.0, top_p=0.4)), [[1, 0, 0, 0]])
    assert probabilities(logits, Sampling(0.1))[0, 0] > 0.99


def test_draws_follow_the_probabilities() -> None:
    choose = Sampling(1.0, top_k=3, seed=3).chooser()
    logits = np.tile(np.log(np.array([0.1, 0.6, 0.05, 0.25])), (20000, 1)).astype(np.float32)
    counts = np.bincount(choose(logits), minlength=4) / 20000
    assert counts[2] == 0
    assert np.allclose(counts, np.array([0.1, 0.6, 0, 0.25]) / 0.95, atol=0.02)


@pytest.mark.parametrize("bad", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_k": -1}, {"temperature": float("nan")}])
def test_bad_sampling(bad) -> None:
    with pytest.raises(UsageError, match="Sampling needs"):
        Sampling(**bad)


# ---- scores


@pytest.mark.parametrize("name", ["group-query", "concat"])
def test_perplexity_is_over_windows_of_their_own(folder: Path, name: str) -> None:
    generator = Generator(folder / f"{name}.onnx")
    ids = np.random.default_rng(0).integers(0, 41, 50)
    total = 0.0
    for begin in (0, 16, 32):
        row = ids[begin : begin + 16]
        logits = np.array(generator.start(1, 16).feed(row[None])[0], dtype=np.float64)
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [logs[i, row[i + 1]] for i in range(15)]
        assert np.allclose(scores(generator, row), expected, atol=1e-6)
        assert np.allclose(scores(generator, row, chunk=5), expected, atol=1e-5)
        total += sum(expected)
    found = perplexity(folder / f"{name}.onnx", ids, window=16)
    assert (found.tokens, found.windows, found.window) == (45, 3, 16)
    assert found.value == pytest.approx(np.exp(-total / 45), rel=1e-6)


def test_texts_too_short_to_score(folder: Path) -> None:
    generator = Generator(folder / "concat.onnx")
    with pytest.raises(InputDataError, match="fewer than one window of 16"):
        perplexity(generator, [1, 2, 3], window=16)
    with pytest.raises(UsageError, match="at least two tokens"):
        perplexity(generator, [1, 2, 3], window=1)
    with pytest.raises(InputDataError, match="at least two tokens"):
        scores(generator, [1])


# ---- other exporters, against PyTorch


@pytest.mark.export
@pytest.mark.parametrize(
    ("name", "exporter"),
    [("llama", "dynamo"), ("gpt2", "torchscript"), ("gemma", "dynamo"), ("opt", "torchscript")],
)
def test_the_same_text_as_transformers(name: str, exporter: str) -> None:
    import torch

    model = cached_model(name)
    prompt = [5, 17, 60, 3, 88]
    with torch.no_grad():
        ids = torch.tensor([prompt])
        settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), use_cache=True, **settings)[0, 5:].tolist()
    generator = Generator(exported_cached(name, exporter))
    assert generator.generate([prompt], max_new_tokens=12) == [expected]
    assert generator.generate([prompt], max_new_tokens=12, chunk=3) == [expected]
    shorter = prompt[2:]
    padding = "left" if name == "gemma" else None  # rotary embeddings know distances only
    rows = generator.generate([prompt, shorter], max_new_tokens=12, padding=padding)
    assert rows == [expected, generator.generate([shorter], max_new_tokens=12)[0]]
