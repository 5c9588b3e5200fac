"""share-kv: bookkeeping on many architectures, that nothing else changes, how it is lowered, and the searches."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

import tiny_decoders
from matrix_models import MODELS
from matrix_variants import Variant
from shared_files import made_once

from graphopt.api import canonical, optimize
from graphopt.calibration.text import TextDataset
from graphopt.errors import UsageError
from graphopt.graph.edits import sort
from graphopt.graph.kv_interface import KVInterface, kv_interface
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.passes.kv.share_kv import ShareKV
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.memory_session import make_session

Arrays = dict[str, npt.NDArray[Any]]
CACHED = Variant("script", 17, "eager", cached=True)
ARCHITECTURES = [
    "llama", "mistral", "qwen3", "gemma2", "phi3", "gpt2", "gptneox", "gptj", "opt", "gptbigcode",
]  # fmt: skip
ASSUMED = ("no-left-padding", "no-batched-chunks", "counted-positions", "max-length=64")


def exported(key: str) -> ir.Model:
    """The canonical graph of a tiny decoder with two layers and random weights."""

    def write(path: Path) -> None:
        from matrix_exports import make

        make(MODELS[key], CACHED, path.parent)
        save(optimize(path.parent / CACHED.file(key), "canonical", verify="none").model, path)

    return load(made_once(f"{key}-canonical.onnx", write))


def run(model: ir.Model, feeds: Arrays) -> Arrays:
    session = make_session(model)
    names = [output.name for output in session.get_outputs()]
    wanted = {item.name for item in (*session.get_inputs(), *session.get_overridable_initializers())}
    return dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in wanted}), strict=True))


def told(interface: KVInterface, ids: npt.NDArray[np.int64], past: int) -> Arrays:
    """Tokens [batch, new] behind `past` others, their mask and their positions, by the names that a decoder has."""
    batch, tokens = ids.shape
    given = {
        interface.token_ids: ids,
        interface.attention_mask: np.ones((batch, past + tokens), dtype=np.int64),
        interface.position_ids: np.tile(np.arange(past, past + tokens), (batch, 1)),
    }
    return {name: array for name, array in given.items() if name is not None}


def fed(model: ir.Model, past: int, tokens: int, batch: int = 2, *, alike: bool = True) -> Arrays:
    """Inputs of a decoder, with equal caches in all layers where they are to be `alike`."""
    interface = kv_interface(model)
    assert interface is not None
    rng = np.random.default_rng(past + tokens)
    feeds = told(interface, rng.integers(3, 40, size=(batch, tokens)), past)
    for pair in interface.pairs:
        rng = np.random.default_rng(pair.part == "key") if alike else rng
        feeds[pair.past] = rng.normal(size=(batch, pair.heads or 0, past, pair.head_size or 0)).astype(np.float32)
    return feeds


def made_equal(model: ir.Model, layer: int, donor: int) -> ir.Model:
    """A copy in which the new keys and values of a layer are those of an earlier one."""
    copy = model.clone()
    interface = kv_interface(copy)
    assert interface is not None
    by_past = {node.inputs[4].name: node for node in copy.graph if node.op_type == "Attention" and node.inputs[4]}
    keys = {pair.layer: pair.past for pair in interface.pairs if pair.part == "key"}
    for place in (1, 2):
        by_past[keys[layer]].replace_input_with(place, by_past[keys[donor]].inputs[place])
    return copy


def shared(model: ir.Model, **options: Any) -> tuple[ir.Model, ShareKV]:
    after = model.clone()
    rule = ShareKV(**options)
    assert rule(after).modified
    sort(after)
    return after, rule


def off(found: Arrays, expected: Arrays) -> float:
    assert found
    return max(float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max()) for name in found)


@pytest.mark.export
@pytest.mark.parametrize("key", ARCHITECTURES)
def test_sharing_between_equal_layers_changes_nothing(key: str, tmp_path: Path) -> None:
    model = exported(key)
    equal = made_equal(model, 1, 0)
    after, rule = shared(model, pairs=[[1, 0]])
    assert [site.detail for site in rule.sites] == ["layer 1 reads the cache of layer 0"]
    before, now = kv_interface(model), kv_interface(after)
    assert before is not None
    assert now is not None
    assert now.layers == before.layers - 1 == 1
    assert now.problems == ()
    assert [(p.past, p.present) for p in now.pairs] == [(p.past, p.present) for p in before.pairs[:2]]
    assert [v.name for v in after.graph.inputs] == [v.name for v in model.graph.inputs][: len(after.graph.inputs)]
    lowered = optimize(after.clone(), "lower", verify="none", assume=ASSUMED).model
    for past, tokens in ((0, 6), (5, 1), (4, 3)):
        feeds = fed(model, past, tokens, batch=1 if past and tokens > 1 else 2)
        expected = run(equal, feeds)
        assert off(run(after, feeds), expected) < 1e-5
        assert off(run(lowered, feeds), expected) < 1e-5
    save(lowered, tmp_path / "model.onnx")
    assert len(Generator(tmp_path / "model.onnx").generate([[5, 6, 7]], max_new_tokens=5, stop=())[0]) == 5


def parsed(layers: int = 4) -> ir.Model:
    """A decoder of several layers with `Attention` on merged heads."""
    model = ir.from_proto(tiny_decoders.decoder("attention", layers=layers))
    assert canonical(model) is model
    return model


@pytest.mark.export
@pytest.mark.parametrize(("key", "width"), [("gpt2", 32), ("phi3", 32)])
def test_packed_projections_are_cut_to_the_queries(key: str, width: int) -> None:
    after, _ = shared(exported(key), pairs=[[1, 0]])
    products = [node for node in after.graph if node.op_type == "MatMul" and node.inputs[1].const_value is not None]
    first, second = (node.inputs[1].const_value.shape for node in (products[0], products[len(products) // 2]))
    assert first[1] > width
    assert width in [node.inputs[1].const_value.shape[1] for node in products[1:]]
    assert sum(node.inputs[1].const_value.shape == first for node in products) < 2 or second == first


@pytest.mark.parametrize("cache", ["growing", "static"])
def test_it_generates_as_the_equal_model_does(cache: Any, tmp_path: Path) -> None:
    model = parsed()
    equal = made_equal(made_equal(model, 2, 1), 3, 1)
    after, _ = shared(model, pairs=[[3, 2], [2, 1]])
    lowered = optimize(after.clone(), "lower", verify="none", assume=ASSUMED).model
    assert sum(node.op_type == "GroupQueryAttention" for node in lowered.graph) == 4
    for name, one in (("equal", equal), ("shared", after), ("lowered", lowered)):
        save(one, tmp_path / f"{name}.onnx")
    prompt = [[1, 2, 3, 4, 5]]
    expected = Generator(tmp_path / "equal.onnx").generate(prompt, max_new_tokens=20, stop=())
    generator = Generator(tmp_path / "lowered.onnx", cache=cache)
    assert generator.cache == cache
    assert generator.generate(prompt, max_new_tokens=20, stop=()) == expected
    assert generator.generate(prompt, max_new_tokens=20, stop=(), chunk=2) == expected
    assert Generator(tmp_path / "shared.onnx").generate(prompt, max_new_tokens=20, stop=()) == expected


def test_long_prompts_in_a_batch_beside_graphopts_operator(tmp_path: Path) -> None:
    """A layer that reads another's cache stays ONNX Runtime's operator, which takes no chunks in a batch."""
    after, _ = shared(parsed(3), pairs=[[2, 1]])
    lowered = optimize(after.clone(), "lower+decode", verify="none", assume=ASSUMED).model
    kinds = [node.op_type for node in lowered.graph if node.op_type in ("CachedAttention", "GroupQueryAttention")]
    assert kinds == ["CachedAttention", "CachedAttention", "GroupQueryAttention"]
    interface = kv_interface(lowered)
    assert interface is not None
    assert [pair.readers for pair in interface.pairs[::2]] == [(), ("GroupQueryAttention",)]
    for name, one in (("plain", after), ("lowered", lowered)):
        save(one, tmp_path / f"{name}.onnx")
    prompts = [[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]]
    expected = Generator(tmp_path / "plain.onnx").generate(prompts, max_new_tokens=6, stop=())
    assert Generator(tmp_path / "lowered.onnx").generate(prompts, max_new_tokens=6, stop=(), chunk=2) == expected


def test_names_move_up_and_chains_end_at_their_root() -> None:
    model = parsed(5)
    after, rule = shared(model, pairs=[[1, 0], [3, 1]])
    assert [site.detail for site in rule.sites] == [
        "layer 1 reads the cache of layer 0", "layer 3 reads the cache of layer 0",
    ]  # fmt: skip
    now = kv_interface(after)
    assert now is not None
    assert [pair.past for pair in now.pairs] == [
        f"past_key_values.{layer}.{part}" for layer in range(3) for part in ("key", "value")
    ]
    # The third cache is that of the last layer.
    feeds = fed(model, 3, 2)
    expected = run(made_equal(made_equal(model, 1, 0), 3, 0), feeds)
    found = run(after, feeds)
    assert np.abs(found["present.2.key"] - expected["present.4.key"]).max() < 1e-5
    assert np.abs(found["present.1.value"] - expected["present.2.value"]).max() < 1e-5


def test_a_causal_attribute_becomes_a_mask() -> None:
    model = parsed(2)
    for node in model.graph:
        if node.op_type == "Attention":
            node.replace_input_with(3, None)
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    after, _ = shared(model, pairs=[[1, 0]])
    for past, tokens in ((0, 5), (4, 1), (4, 3)):
        feeds = fed(model, past, tokens)
        assert off(run(after, feeds), run(made_equal(model, 1, 0), feeds)) < 1e-5


@pytest.mark.parametrize("bits", [8, 4])
def test_the_quantized_cache_of_onnx_runtime_is_shared_too(bits: int) -> None:
    """It computes what the model of equal layers does, whose caches have the same scales."""
    model = parsed(3)
    text = TextDataset(np.random.default_rng(0).integers(0, 41, 64), 16)
    options = {"operator": "contrib", "key_bits": bits, "value_bits": bits}
    recipe = {"passes": [{"recipe": "lower"}, {"quantize-kv": options}]}

    def quantized(one: ir.Model) -> ir.Model:
        return optimize(one, recipe, verify="none", assume=ASSUMED, calibration=text).model

    after, equal = quantized(shared(model, pairs=[[2, 1]])[0]), quantized(made_equal(model, 2, 1))
    assert sum("k_quant_type" in node.attributes for node in after.graph) == 3
    feeds = fed(model, 0, 9)
    for value in equal.graph.inputs:
        if (value.name or "") in feeds and "past" in (value.name or ""):
            assert value.dtype is not None
            assert value.shape is not None
            feeds[value.name or ""] = np.zeros([2, 2, 0, int(value.shape[3])], dtype=value.dtype.numpy())
    prefilled, expected = run(after, feeds), run(equal, feeds)
    assert off({"logits": prefilled["logits"]}, expected) < 1e-5
    more = fed(model, 9, 1)
    pasts = {name.replace("present", "past_key_values"): array for name, array in expected.items()}
    found = run(after, more | pasts)
    assert off({"logits": found["logits"]}, run(equal, more | pasts)) < 1e-5


SMALL_BLOCKS = {"block_size": 8, "window": 4}


@pytest.mark.parametrize("options", [{}, {"key_bits": 4, "value_bits": 4}, {"rotate_at_read": False}])
@pytest.mark.parametrize("cache", ["static", "growing"])
def test_graphopts_quantized_cache_is_shared_too(options: dict[str, Any], cache: Any, tmp_path: Path) -> None:
    """It computes what the model of equal layers does, whose caches are equal."""
    model, recipe = parsed(3), {"passes": [{"quantize-kv": SMALL_BLOCKS | options}]}
    found = []
    for one in (shared(model, pairs=[[1, 0], [2, 0]])[0], made_equal(made_equal(model, 1, 0), 2, 0)):
        result = optimize(one, recipe, verify="none", assume=(*ASSUMED, "counted-positions"))
        found.append(result.model)
    after = found[0]
    attentions = [node for node in after.graph if node.op_type == "QuantizedKVAttention"]
    assert [node.attributes["shared"].as_int() for node in attentions] == [0, 1, 1]
    assert not any(value.uses() for node in attentions[1:] for value in node.outputs[1:])
    interface = kv_interface(after)
    assert interface is not None
    assert (interface.layers, interface.shared_buffer) == (1, True)
    ids = np.random.default_rng(0).integers(0, 41, (3, 40))
    results = []
    for number, one in enumerate(found):
        save(one, tmp_path / f"{number}.onnx")
        for pieces in ([40], [20, *[1] * 20]):
            decoding = Generator(tmp_path / f"{number}.onnx", cache=cache).start(3, 40)
            ends = list(itertools.accumulate(pieces))
            parts = [decoding.feed(ids[:, e - n : e]).copy() for n, e in zip(pieces, ends, strict=True)]
            results.append(np.concatenate(parts, axis=1))
    for other in results[1:]:
        np.testing.assert_allclose(other, results[0], atol=2e-3 * np.abs(results[0]).max())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pairs": [[0, 1]]}, "earlier layer"), ({"pairs": [[1, 0], [1, 0]]}, "twice"), ({"pairs": [[1]]}, "pairs holds"),
        ({"count": 0}, "count"), ({"fraction": 1.5}, "fraction"), ({"search": "random"}, "search"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ShareKV(**options)


def test_a_layer_that_isnt_there() -> None:
    with pytest.raises(UsageError, match="no layer 7"):
        ShareKV(pairs=[[7, 0]])(parsed(2))


@pytest.mark.parametrize("search", ["loss", "similar", "dissimilar"])
def test_searches_find_pairs_that_can_be_given(search: Any) -> None:
    text = TextDataset(np.random.default_rng(0).integers(0, 41, 64), 16)
    model = parsed(4)
    options = {"search": search, "count": 2, "threshold": -1.0, "keep": [1], "samples": 2, "heal": False}
    result = optimize(model.clone(), {"passes": [{"share-kv": options}]}, verify="none", calibration=text)
    found = result.report.run.records[0].options["pairs"]
    assert len(found) == 2
    assert 1 not in [layer for layer, _ in found]
    again = optimize(model.clone(), {"passes": [{"share-kv": {"pairs": found}}]}, verify="none")
    feeds = fed(model, 0, 8)
    assert off(run(again.model, feeds), run(result.model, feeds)) == 0


def test_healing_makes_up_for_a_donor_that_differs() -> None:
    """It gives what it promises on text that it hasn't seen, and the same again with the pairs that were found."""
    text = TextDataset(np.random.default_rng(0).integers(0, 41, 32 * 40), 32)
    model = parsed(3)
    plain, _ = shared(model, pairs=[[2, 1]])
    options = {"pairs": [[2, 1]], "heal": True, "heal_samples": 40}
    result = optimize(model.clone(), {"passes": [{"share-kv": options}]}, verify="none", calibration=text)
    (site,) = result.report.run.records[0].sites
    assert "the projections of queries and outputs refitted" in site.detail
    feeds = fed(model, 0, 32)
    expected = run(model, feeds)["logits"]
    lost = [float(np.square(run(one, feeds)["logits"] - expected).sum()) for one in (plain, result.model)]
    assert lost[1] < 0.7 * lost[0]
    again = optimize(model.clone(), {"passes": [{"share-kv": options}]}, verify="none", calibration=text)
    assert off(run(again.model, feeds), run(result.model, feeds)) == 0


def test_healing_leaves_what_is_right() -> None:
    text = TextDataset(np.random.default_rng(0).integers(0, 41, 16 * 8), 16)
    model = made_equal(parsed(3), 2, 1)
    options = {"pairs": [[2, 1]], "heal": True}
    result = optimize(model.clone(), {"passes": [{"share-kv": options}]}, verify="none", calibration=text)
    assert "its weights stay" in result.report.run.records[0].sites[0].detail
    feeds = fed(model, 0, 16)
    assert off(run(result.model, feeds), run(model, feeds)) < 1e-5


def test_a_model_without_a_cache_is_left() -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 23]> g (float[2] x) => (float[2] y) { y = Neg(x) }')
    assert not ShareKV(pairs=[[1, 0]])(model).modified


def test_what_was_equal_from_the_start_is_found(tmp_path: Path) -> None:
    """Of four layers the third has the keys and values of the first: the search loses nothing by sharing them."""
    model = made_equal(parsed(4), 2, 0)
    text = TextDataset(np.random.default_rng(1).integers(0, 41, 48), 24)
    rule = ShareKV(count=1)
    result = optimize(model, {"passes": [{"share-kv": {"count": 1}}]}, verify="none", calibration=text)
    assert result.report.run.records[0].options["pairs"] == [[2, 0]]
    assert result.report.run.records[0].options["expected_divergence"][0] < 1e-6
    assert rule.option_values()["count"] == 1
    save(result.model, tmp_path / "model.onnx")
    assert load(tmp_path / "model.onnx") is not None
