"""QuantizedKVAttention: body, kernel, the layout of the cache, and the attention that all of it stands for."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.runtime_ops import library_path, operators
from graphopt.runtime_ops.operator import OLDEST_OPSET
from graphopt.runtime_ops.quantized_kv_attention import CacheLayout, layout_of
from tests.runtime_ops.operator_cases import ISAS, limited, node_model

NAME = "QuantizedKVAttention"
Array = npt.NDArray[Any]


def node(**given: Any) -> dict[str, Any]:
    """The attributes of a small node, but for those given."""
    small = {"num_heads": 4, "kv_num_heads": 2, "scale": 0.25, "block_size": 8, "window": 5}
    return operators()[NAME].attributes_of(**(small | given))


@functools.lru_cache(512)
def model(attributes: tuple[tuple[str, Any], ...], half: bool, opset: int = 21) -> bytes:
    """A node as a model, for inputs of any sizes."""
    dtype = np.float16 if half else np.float32
    given = [np.zeros((1, 1, 1), dtype)] * 3 + [np.zeros((1,) * 4, np.uint8), np.zeros((1,) * 4, np.float16)]
    given += [np.zeros((1,) * 5, np.float16), np.zeros(1, np.int32)] + [np.zeros((1, 1), np.float32)] * 2
    return node_model(NAME, given, dict(attributes), opset, outputs=1 if dict(attributes)["shared"] else None)


@functools.lru_cache(512)
def session(
    attributes: tuple[tuple[str, Any], ...], half: bool, kernel: bool, threads: int
) -> onnxruntime.InferenceSession:
    """A session of that model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    if kernel:
        options.register_custom_ops_library(str(library_path()))
    return onnxruntime.InferenceSession(model(attributes, half), options, providers=["CPUExecutionProvider"])


def run(attributes: dict[str, Any], inputs: Sequence[Array], kernel: bool = True, threads: int = 2) -> list[Array]:
    """The outputs of one node."""
    made = session(tuple(attributes.items()), inputs[0].dtype == np.float16, kernel, threads)
    return made.run(None, {f"input{i}": array for i, array in enumerate(inputs)})


def judge(attributes: dict[str, Any], inputs: Sequence[Array], atol: float, rtol: float = 0.0) -> list[Array]:
    """Hold the kernel, on one thread and on two, against the body: its result within `atol`, its cache to the bit."""
    expected = run(attributes, inputs, kernel=False)
    for threads in (1, 2):
        found = run(attributes, inputs, threads=threads)
        for index, (want, have) in enumerate(zip(expected, found, strict=True)):
            assert have.dtype == want.dtype
            np.testing.assert_allclose(
                have.astype(np.float64), want.astype(np.float64), atol=0 if index else atol, rtol=0 if index else rtol
            )
    return expected


def tables(rows: int, half: int) -> tuple[Array, Array]:
    angles = np.arange(rows)[:, None] * 100.0 ** (-np.arange(half) / max(half, 1))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def tokens(attributes: dict[str, Any], batch: int, count: int, depth: int, dtype: type = np.float32) -> list[Array]:
    """Queries, keys (one of whose channels is large) and values."""
    rng = np.random.default_rng(count * depth + batch)
    heads, kv = attributes["num_heads"], attributes["kv_num_heads"]
    made = [rng.standard_normal((batch, count, n * depth)) for n in (heads, kv, kv)]
    made[1][:, :, 1] = 4 * made[1][:, :, 1] + 7
    return [array.astype(dtype) for array in made]


def cache(attributes: dict[str, Any], batch: int, room: int, depth: int) -> list[Array]:
    """An empty cache, filled with what nobody may look at."""
    codes, scales, recent = layout_of(attributes, depth).shapes(batch, room)
    return [np.full(codes, 0xA5, np.uint8), np.full(scales, np.nan, np.float16), np.full(recent, np.nan, np.float16)]


def feed(
    attributes: dict[str, Any], new: Sequence[Array], past: Sequence[Array], last: Sequence[int], half: int
) -> list[Array]:
    """The inputs of one run."""
    rows = max(last, default=0) + 1
    return [*new, *past, np.array(last, np.int32), *tables(rows if half else 0, half)]


def through(
    attributes: dict[str, Any], all_tokens: Sequence[Array], pieces: Sequence[int], room: int, half: int, kernel: bool
) -> list[Array]:
    """All outputs together, and the cache in the end, of one text read in pieces."""
    depth = all_tokens[1].shape[2] // attributes["kv_num_heads"]
    past: list[Array] = cache(attributes, len(all_tokens[0]), room, depth)
    done, results = 0, []
    for piece in pieces:
        new = [array[:, done : done + piece] for array in all_tokens]
        done += piece
        inputs = feed(attributes, new, past, [done - 1] * len(new[0]), half)
        y, *past = run(attributes, inputs, kernel)
        results.append(y)
    return [np.concatenate(results, axis=1), *past]


def plain(attributes: dict[str, Any], new: Sequence[Array], half: int) -> Array:
    """Attention over a whole text in double precision."""
    heads, kv = attributes["num_heads"], attributes["kv_num_heads"]
    batch, count, width = new[0].shape
    q, k, v = (a.astype(np.float64).reshape(batch, count, -1, width // heads) for a in new)
    cos, sin = (t[None, :, None].astype(np.float64) for t in tables(count, half))

    def turned(x: Array) -> Array:
        y = x.copy()
        step, other = (2, 1) if attributes["rotary_interleaved"] else (1, half)
        a = np.arange(half) * step
        y[..., a] = x[..., a] * cos - x[..., a + other] * sin
        y[..., a + other] = x[..., a + other] * cos + x[..., a] * sin
        return y

    k, v = (np.repeat(a, heads // kv, axis=2) for a in (turned(k), v))
    scores = np.einsum("bihd,bjhd->bhij", turned(q), k) * attributes["scale"]
    if attributes["softcap"] > 0:
        scores = attributes["softcap"] * np.tanh(scores / attributes["softcap"])
    i = np.arange(count)
    seen = i[None] <= i[:, None]
    if attributes["local_window_size"] >= 0:
        seen &= i[None] > i[:, None] - attributes["local_window_size"]
    scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), v).reshape(batch, count, width)


CASES = {
    "8 bits": {},
    "4 and 3 bits": {"key_bits": 4, "value_bits": 3},
    "2 and 8 bits, per token": {"key_bits": 2, "key_per_channel": 0},
    "3 and 4 bits in groups": {"key_bits": 3, "value_bits": 4, "key_per_channel": 0, "group_size": 8},
    "groups of values": {"key_bits": 4, "value_bits": 2, "group_size": 4},
    "rotated at read": {"rotate_at_read": 1},
    "rotated at read, pairs side by side": {"rotate_at_read": 1, "rotary_interleaved": 1, "key_bits": 4},
    "rotated at read, per token": {"rotate_at_read": 1, "key_per_channel": 0, "group_size": 8},
    "pairs side by side": {"rotary_interleaved": 1, "value_bits": 4},
    "softcap": {"softcap": 3.0},
    "local window": {"local_window_size": 11},
    "local window within the unquantized": {"local_window_size": 3, "rotate_at_read": 1},
    "no window": {"window": 0},
    "long window": {"window": 30},
    "blocks of 4": {"block_size": 4, "window": 6},
    "blocks of 32": {"block_size": 32, "rotate_at_read": 1},
    "one head": {"num_heads": 1, "kv_num_heads": 1},
    "seven queries a head": {"num_heads": 7, "kv_num_heads": 1, "rotate_at_read": 1, "block_size": 16},
}


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_is_the_body(name: str) -> None:
    """A prompt padded to the longest row, then a token each, then a piece, in two types."""
    attributes, depth, batch = node(**CASES[name]), 16, 2
    for dtype, atol in ((np.float32, 5e-4), (np.float16, 5e-3)):
        if dtype == np.float16 and name not in ("8 bits", "rotated at read"):
            continue
        everything = tokens(attributes, batch, 70, depth, dtype)
        past, done = cache(attributes, batch, 90, depth), np.array([0, 0])
        for new, count in ((47, (47, 20)), (1, (1, 1)), (9, (9, 9)), (1, (1, 1))):
            given_tokens = [array[:, :new] for array in everything]
            done = done + count
            inputs = feed(attributes, given_tokens, past, list(done - 1), 6)
            y, *past = judge(attributes, inputs, atol)
            assert not y[1, count[1] :].any()  # padding
            assert np.isfinite(y).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "case",
    [
        {"block_size": 32, "window": 8},
        {"block_size": 32, "window": 8, "rotate_at_read": 1, "key_bits": 4, "value_bits": 4},
        {"block_size": 64, "window": 0, "key_bits": 3, "value_bits": 2, "num_heads": 6},
        {"block_size": 20, "window": 3, "key_per_channel": 0, "group_size": 20, "key_bits": 3},
        {"block_size": 16, "window": 3, "key_per_channel": 0, "rotate_at_read": 1, "num_heads": 10},
    ],
)
def test_all_instructions(isa: str, case: dict[str, Any]) -> None:
    """Heads as large as those of real models, and odd ones."""
    attributes = node(**case)
    for depth in (20 if case["block_size"] == 20 else 64, 40):
        everything = tokens(attributes, 1, 140, depth)
        past = cache(attributes, 1, 160, depth)
        with limited(isa):
            first = feed(attributes, [a[:, :139] for a in everything], past, [138], 8)
            _, *past = judge(attributes, first, 5e-4)
            judge(attributes, feed(attributes, [a[:, 139:] for a in everything], past, [139], 8), 5e-4)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", [True, False])
def test_a_shared_cache_is_read_as_its_own(name: str, kernel: bool) -> None:
    """With other queries than those of the node that wrote it: a prompt of rows of two lengths, then token by token."""
    attributes, depth = node(**CASES[name]), 16
    everything = tokens(attributes, 2, 70, depth)
    past, done = cache(attributes, 2, 90, depth), np.array([0, 0])
    for new, count in ((47, (47, 20)), *[(1, (1, 1))] * 9):
        done = done + count
        inputs = feed(attributes, [array[:, :new] for array in everything], past, list(done - 1), 6)
        inputs[0] = inputs[0][:, :, ::-1].copy()
        own, *present = run(attributes, inputs, kernel)
        reading = [*inputs[:3], *present, *inputs[6:]]
        (shared,) = run({**attributes, "shared": 1}, reading, kernel)
        np.testing.assert_allclose(shared, own, atol=1e-5)
        past = present


@pytest.mark.parametrize("name", CASES)
def test_pieces_behind_a_shared_cache(name: str) -> None:
    """The first tokens of a long piece see blocks whose tokens have left the ring; the kernel and the body alike."""
    attributes, depth = node(**CASES[name]), 16
    everything = tokens(attributes, 2, 70, depth)
    past, done = cache(attributes, 2, 90, depth), np.array([0, 0])
    for new, count in ((26, (26, 19)), (30, (30, 30)), (3, (3, 3)), (9, (9, 9))):
        done = done + count
        inputs = feed(attributes, [array[:, :new] for array in everything], past, list(done - 1), 6)
        own, *past = run(attributes, inputs)
        (shared,) = judge({**attributes, "shared": 1}, [*inputs[:3], *past, *inputs[6:]], 5e-4)
        assert not shared[1, count[1] :].any()
        # What the two newest tokens see hasn't left the ring.
        for row, real in enumerate(count):
            np.testing.assert_allclose(shared[row, :real][-2:], own[row, :real][-2:], atol=1e-5)


def test_a_shared_cache_that_is_too_short_is_told() -> None:
    attributes = node(shared=1)
    everything = tokens(attributes, 1, 70, 16)
    inputs = feed(attributes, everything, cache(attributes, 1, 20, 16), [69], 6)
    with pytest.raises(Exception, match="the shared cache has 1 blocks, and its tokens take 8"):
        run(attributes, inputs)


def test_models_without_the_attribute_run_as_ever() -> None:
    attributes = node()
    inputs = feed(attributes, tokens(attributes, 1, 12, 16), cache(attributes, 1, 20, 16), [11], 6)
    content = onnx.load_from_string(node_model(NAME, inputs, attributes))
    kept = [attribute for attribute in content.graph.node[0].attribute if attribute.name != "shared"]
    del content.graph.node[0].attribute[:], content.functions[:]
    content.graph.node[0].attribute.extend(kept)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(content.SerializeToString(), options, providers=["CPUExecutionProvider"])
    for have, want in zip(
        session.run(None, {f"input{i}": array for i, array in enumerate(inputs)}), run(attributes, inputs), strict=True
    ):
        np.testing.assert_array_equal(have, want)


def test_a_present_that_is_left_out_is_told() -> None:
    attributes = node()
    inputs = feed(attributes, tokens(attributes, 1, 1, 16), cache(attributes, 1, 20, 16), [0], 6)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    content = onnx.load_from_string(node_model(NAME, inputs, attributes, outputs=1))
    content.graph.node[0].output[1:] = ["", "", ""]
    session = onnxruntime.InferenceSession(content.SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(Exception, match="only a shared cache"):
        session.run(None, {f"input{i}": array for i, array in enumerate(inputs)})


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kernel", [True, False])
def test_the_pieces_of_a_text_make_no_difference(name: str, kernel: bool) -> None:
    attributes = node(**CASES[name])
    everything = tokens(attributes, 1, 40, 16)
    whole = through(attributes, everything, [40], 0, 6, kernel)
    pieces = through(attributes, everything, [19, 1, 1, 8, *[1] * 9, 2], 50, 6, kernel)
    np.testing.assert_allclose(pieces[0], whole[0], atol=5e-4)
    blocks = whole[1].shape[1]
    assert blocks == max(40 - attributes["window"], 0) // attributes["block_size"]
    np.testing.assert_array_equal(pieces[1][:, :blocks], whole[1])
    np.testing.assert_array_equal(pieces[2][:, :blocks], whole[2])
    ring = min(40, attributes["window"] + attributes["block_size"])
    places = np.arange(40 - ring, 40) % (attributes["window"] + attributes["block_size"])
    np.testing.assert_array_equal(pieces[3][:, :, :, places], whole[3][:, :, :, places])


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize(
    ("case", "atol"),
    [
        ({}, 0.03),
        ({"rotate_at_read": 1, "rotary_interleaved": 1}, 0.03),
        ({"softcap": 5.0, "local_window_size": 20}, 0.03),
        ({"key_per_channel": 0, "group_size": 8}, 0.05),
        ({"key_bits": 4, "value_bits": 4}, 0.5),
        ({"window": 60, "key_bits": 2, "value_bits": 2}, 1e-2),
    ],
)
def test_is_attention(kernel: bool, case: dict[str, Any], atol: float) -> None:
    attributes = node(**case)
    everything = tokens(attributes, 2, 60, 32)
    y = through(attributes, everything, [60], 0, 16, kernel)[0]
    np.testing.assert_allclose(y, plain(attributes, everything, 16), atol=atol)


def unpacked(packed: Array, count: int, bits: int) -> Array:
    """Codes as the operator's description tells them."""
    low = 2 if bits == 3 else bits
    part = count * low // 8
    codes = np.concatenate([packed[..., :part] >> (low * p) & (1 << low) - 1 for p in range(8 // low)], axis=-1)
    if bits == 3:
        codes |= np.concatenate([packed[..., part:] >> p & 1 for p in range(8)], axis=-1) << 2
    return codes


@pytest.mark.parametrize("key_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("per_channel", [1, 0])
def test_the_cache_is_as_described(key_bits: int, per_channel: int) -> None:
    """Each number is read back within half a step of what it was, from the bytes that the description tells."""
    value_bits = {2: 8, 3: 2, 4: 3, 8: 4}[key_bits]
    attributes = node(key_bits=key_bits, value_bits=value_bits, key_per_channel=per_channel, group_size=8, window=0)
    width, depth, kv = 8, 16, 2
    everything = tokens(attributes, 1, 2 * width, depth)
    _, codes, scales, recent = through(attributes, everything, [2 * width], 0, 0, True)
    layout = CacheLayout(kv, depth, key_bits, value_bits, bool(per_channel), width, 8, 0)
    assert codes.shape == (1, 2, kv, layout.code_bytes)
    assert scales.shape == (1, 2, kv, layout.scale_numbers)
    key_bytes = width * depth * key_bits // 8
    numbers = depth if per_channel else 2 * width
    parts = np.split(scales.astype(np.float32), np.cumsum([numbers, numbers, 2 * width]), axis=-1)
    key_scale, key_least, value_scale, value_least = (
        np.broadcast_to(p[..., None], (*p.shape, width))
        if p.shape[-1] == depth and per_channel and i < 2
        else np.repeat(p.reshape(1, 2, kv, 2, width), 8, axis=3)
        for i, p in enumerate(parts)
    )
    keys = unpacked(codes[..., :key_bytes], width * depth, key_bits).reshape(1, 2, kv, depth // 4, width, 4)
    keys = keys.transpose(0, 1, 2, 3, 5, 4).reshape(1, 2, kv, depth, width)
    values = unpacked(codes[..., key_bytes:], width * depth, value_bits).reshape(1, 2, kv, width // 4, depth, 4)
    values = values.transpose(0, 1, 2, 4, 3, 5).reshape(1, 2, kv, depth, width)
    for array, found, scale, least in (
        (everything[1], keys, key_scale, key_least),
        (everything[2], values, value_scale, value_least),
    ):
        wanted = array.astype(np.float16).astype(np.float32).reshape(1, 2, width, kv, depth).transpose(0, 1, 3, 4, 2)
        assert (np.abs(found * scale + least - wanted) <= 0.51 * scale + 1e-6).all()
    newest = everything[1].astype(np.float16)[0, width:].reshape(width, kv, depth).transpose(1, 0, 2)
    np.testing.assert_array_equal(recent[0, :, 0], newest)


def test_in_place_writes_only_what_is_new() -> None:
    """Past and present in one buffer: the same outputs, in every run."""
    attributes = node(rotate_at_read=1, key_bits=4)
    everything = tokens(attributes, 2, 40, 16)
    expected = through(attributes, everything, [21, *[1] * 11, 8], 40, 6, True)
    buffers = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in cache(attributes, 2, 40, 16)]
    past = cache(attributes, 2, 40, 16)
    done, results = 0, []
    for piece in [21, *[1] * 11, 8]:
        new = [array[:, done : done + piece] for array in everything]
        done += piece
        inputs = feed(attributes, new, past, [done - 1] * 2, 6)
        binding = session(tuple(attributes.items()), False, True, 2).io_binding()
        for index in (0, 1, 2, 6, 7, 8):
            binding.bind_cpu_input(f"input{index}", np.ascontiguousarray(inputs[index]))
        binding.bind_output("output0")
        for index, buffer in enumerate(buffers):
            binding.bind_ortvalue_input(f"input{3 + index}", buffer)
            binding.bind_ortvalue_output(f"output{1 + index}", buffer)
        session(tuple(attributes.items()), False, True, 2).run_with_iobinding(binding)
        results.append(binding.get_outputs()[0].numpy())
    for have, want in zip([np.concatenate(results, 1), *(b.numpy() for b in buffers)], expected, strict=True):
        np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("block", [8, 16])
def test_tables_that_are_constants(block: int) -> None:
    """Two nodes that share them, in a prompt and after it."""
    attributes = node(rotate_at_read=1, block_size=block)
    cos, sin = tables(70, 6)
    made = ir.from_proto(onnx.load_from_string(model(tuple(attributes.items()), False)))
    for name, table in (("input7", cos), ("input8", sin)):
        value = next(value for value in made.graph.inputs if value.name == name)
        made.graph.inputs.remove(value)
        value.const_value, value.shape = ir.Tensor(table), ir.Shape(table.shape)
        made.graph.register_initializer(value)
    (first,) = made.graph
    again = ir.Node(first.domain, first.op_type, first.inputs, attributes=first.attributes.values(), num_outputs=4)
    for index, output in enumerate(again.outputs):
        output.name, output.type = f"again{index}", first.outputs[index].type
    made.graph.append(again)
    made.graph.outputs.extend(again.outputs)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    both = onnxruntime.InferenceSession(ir.to_proto(made).SerializeToString(), options)
    everything = tokens(attributes, 1, 61, 16)
    past = cache(attributes, 1, 70, 16)
    for begin, end in ((0, 60), (60, 61)):
        inputs = [*(a[:, begin:end] for a in everything), *past, np.array([end - 1], np.int32), cos, sin]
        expected = run(attributes, inputs, kernel=False)
        found = both.run(None, {f"input{i}": array for i, array in enumerate(inputs[:7])})
        for have in (found[:4], found[4:]):
            np.testing.assert_allclose(have[0], expected[0], atol=5e-4)
            np.testing.assert_array_equal(have[1], expected[1])
        past = expected[1:]


@pytest.mark.parametrize("what", [np.nan, np.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_no_number_stays_in_its_head(what: float, which: int) -> None:
    attributes = node()
    everything = tokens(attributes, 1, 31, 16)
    everything[which][0, 30, 3] = what
    past = through(attributes, [a[:, :30] for a in everything], [30], 0, 6, True)[1:]
    (y, *_) = judge(attributes, feed(attributes, [a[:, 30:] for a in everything], past, [30], 6), 5e-4)
    assert not np.isfinite(y[0, 0, :16]).all()
    assert np.isfinite(y[0, 0, 32:]).all()


def test_sizes_of_nothing() -> None:
    attributes = node()
    for batch, new, last in ((0, 3, []), (2, 0, [3, 5]), (2, 1, [-1, 0]), (1, 2, [-1])):
        everything = [array[:, :new] for array in tokens(attributes, batch, max(new, 1), 16)]
        past = [np.zeros_like(array) for array in cache(attributes, batch, 30, 16)]
        y, *_ = judge(attributes, feed(attributes, everything, past, last, 4), 1e-4)
        assert y.shape == everything[0].shape


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from([2, 3, 4, 8]), st.sampled_from([2, 3, 4, 8]), st.sampled_from([4, 8, 12, 36]),
    st.integers(1, 3), st.integers(1, 4), st.integers(0, 20), st.integers(1, 60), st.integers(0, 40),
    st.integers(0, 7), st.booleans(), st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_sizes(
    key_bits: int, value_bits: int, width: int, kv: int, queries: int, window: int, past: int, new: int, flags: int,
    grouped: bool, random: Any,
) -> None:  # fmt: skip
    depth = 4 * random.randint(1, 10)
    attributes = node(
        key_bits=key_bits, value_bits=value_bits, block_size=width, kv_num_heads=kv, num_heads=kv * queries,
        window=window, key_per_channel=flags & 1, rotate_at_read=flags >> 1 & 1, rotary_interleaved=flags >> 2,
        group_size=4 if grouped else 0, scale=depth**-0.5,
    )  # fmt: skip
    half = random.randint(0, depth // 2)
    everything = tokens(attributes, 1, past + new, depth)
    empty = cache(attributes, 1, 0, depth)
    _, *known = run(attributes, feed(attributes, [a[:, :past] for a in everything], empty, [past - 1], half))
    inputs = feed(attributes, [a[:, past:] for a in everything], known, [past + new - 1], half)
    judge(attributes, inputs, atol=1e-3, rtol=1e-3)


def test_the_body_at_the_oldest_opset() -> None:
    attributes = node(rotate_at_read=1, key_bits=3)
    inputs = feed(attributes, tokens(attributes, 2, 47, 16), cache(attributes, 2, 0, 16), [46, 20], 6)
    oldest = onnxruntime.InferenceSession(model(tuple(attributes.items()), False, OLDEST_OPSET))
    found = oldest.run(None, {f"input{i}": array for i, array in enumerate(inputs)})
    for have, want in zip(found, run(attributes, inputs, kernel=False), strict=True):
        np.testing.assert_array_equal(have, want)


def test_bytes_of_a_cache() -> None:
    for depth in (64, 128):
        for bits, share in ((8, 0.3), (4, 0.16)):
            assert CacheLayout(3, depth, bits, bits).bytes(4096) <= share * 4096 * 3 * 2 * depth * 4


def test_cost_counts_the_cache() -> None:
    attributes = node()
    shapes = [(1, 1, 64), (1, 1, 32), (1, 1, 32), *CacheLayout(2, 16, 8, 8, block_size=8, window=5).shapes(1, 100)]
    cost = operators()[NAME].cost([*shapes, (1,), (128, 8), (128, 8)], attributes)
    assert cost.flops >= 4 * 4 * 16 * 100
    assert cost.bytes >= 2 * 2 * 16 * 100


@pytest.mark.parametrize(
    ("attributes", "change", "says"),
    [
        ({}, {6: np.array([-2], np.int32)}, "seqlens_k is -2"),
        ({}, {6: np.array([2**31 - 1], np.int32)}, "is longer than the cache"),
        ({}, {6: np.array([80], np.int32)}, "a past of 80 tokens .* is longer than the cache"),
        ({}, {6: np.array([1, 1], np.int32)}, r"seqlens_k is \[2\] and must be \[1\]"),
        ({}, {7: np.zeros((3, 4), np.float32), 8: np.zeros((3, 4), np.float32)}, "the tables have 3 rows"),
        ({}, {7: np.zeros((90, 9), np.float32), 8: np.zeros((90, 9), np.float32)}, "turn more than"),
        ({}, {8: np.zeros((90, 3), np.float32)}, "sin_cache is"),
        ({}, {0: np.zeros((1, 1, 60), np.float32)}, "query is"),
        ({}, {1: np.zeros((1, 2, 32), np.float32)}, "key is"),
        ({}, {2: np.zeros((2, 1, 32), np.float32)}, "value is"),
        ({}, {3: np.zeros((1, 3, 2, 255), np.uint8)}, "past_codes is"),
        ({}, {4: np.zeros((1, 4, 2, 48), np.float16)}, "past_scales is"),
        ({}, {5: np.zeros((1, 2, 2, 14, 16), np.float16)}, "past_recent is"),
        ({}, {5: np.zeros((1, 2, 2, 13, 18), np.float16)}, "a multiple of 4 features, not 18"),
        ({"key_bits": 5}, {}, "2, 3, 4 or 8 bits, not 5"),
        ({"block_size": 6}, {}, "block_size is a positive multiple of 4, not 6"),
        ({"group_size": 12}, {}, "group_size 12 doesn't divide"),
        ({"num_heads": 3}, {}, "num_heads 3 isn't a multiple of kv_num_heads 2"),
        ({"window": -1}, {}, "window is -1"),
    ],
)
def test_what_is_wrong_names_the_node(attributes: dict[str, Any], change: dict[int, Array], says: str) -> None:
    right = node()
    past = [np.zeros_like(array) for array in cache(right, 1, 36, 16)]
    inputs = [*tokens(right, 1, 1, 16), *past, np.array([30], np.int32), *tables(90, 4)]
    for index, array in change.items():
        inputs[index] = array
    with pytest.raises(Exception, match=f"{NAME} 'the_node': .*{says}"):
        run(right | attributes, inputs)


def test_a_bound_buffer_that_is_too_short_is_an_error() -> None:
    attributes = node()
    past = [np.zeros_like(array) for array in cache(attributes, 1, 12, 16)]
    inputs = feed(attributes, tokens(attributes, 1, 1, 16), past, [12], 4)
    made = session(tuple(attributes.items()), False, True, 1)
    binding = made.io_binding()
    for index, array in enumerate(inputs):
        binding.bind_cpu_input(f"input{index}", array)
    binding.bind_output("output0")
    for index in range(3):
        binding.bind_ortvalue_output(f"output{1 + index}", onnxruntime.OrtValue.ortvalue_from_numpy(past[index]))
    with pytest.raises(Exception, match="the_node"):
        made.run_with_iobinding(binding)
