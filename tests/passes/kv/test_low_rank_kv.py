"""low-rank-kv: exact where keys and values have the rank that stays, on many architectures; and what is left alone."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import tiny_decoders
from test_share_kv import ASSUMED, Arrays, exported, off, parsed, run, shared, told

from graphopt.analysis.shapes import infer
from graphopt.api import Result, canonical, optimize, verify
from graphopt.calibration.text import TextDataset
from graphopt.errors import GraphoptError, VerificationError
from graphopt.graph.kept_layers import kept_layers
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.kv_names import rename_kv_cache
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.passes.kv.cache_moments import gathered
from graphopt.passes.kv.cached_layers import cached_layers
from graphopt.passes.kv.feature_bases import spectrum
from graphopt.passes.kv.low_rank_kv import LowRankKV
from graphopt.passes.lower.cached_site import projection, read
from graphopt.runtime_ops.generation import Generator

ARCHITECTURES = ["llama", "qwen3", "gemma2", "phi3", "gpt2", "gptneox", "gptbigcode"]
SEPARATE = ["llama", "qwen2", "phi", "opt", "gptj", "starcoder2", "mistral", "granite", "nemotron"]
"""Those whose keys and values are products of their own, of which most have biases."""


def text(tokens: int = 64, window: int = 16) -> TextDataset:
    return TextDataset(np.random.default_rng(0).integers(0, 41, tokens), window)


def rewritten(model: ir.Model, assume: tuple[str, ...] = ASSUMED, **options: Any) -> Result:
    recipe = {"passes": [{"low-rank-kv": options}]}
    return optimize(model.clone(), recipe, verify="none", calibration=text(), assume=assume)


def details(result: Result, outcome: str = "applied") -> list[str]:
    return [site.detail for site in result.report.run.records[0].sites if site.outcome == outcome]


def steps(model: ir.Model, pieces: list[int], batch: int = 1) -> list[npt.NDArray[Any]]:
    """The logits of a text that comes in pieces, each after the cache of those before it."""
    interface = kv_interface(model)
    assert interface is not None
    assert interface.problems == ()
    rng = np.random.default_rng(5)
    caches: Arrays = {
        pair.past: np.zeros((batch, pair.heads or 0, 0, pair.head_size or 0), ir.DataType[pair.dtype].numpy())
        for pair in interface.pairs
    }
    past, found = 0, []
    for count in pieces:
        feeds = {**caches, **told(interface, rng.integers(3, 40, size=(batch, count)), past)}
        given = run(model, feeds)
        found.append(given[interface.logits or ""])
        caches = {pair.past: given[pair.present or ""] for pair in interface.pairs}
        past += count
    return found


def differs(a: list[npt.NDArray[Any]], b: list[npt.NDArray[Any]]) -> float:
    return max(off({"logits": x}, {"logits": y}) for x, y in zip(a, b, strict=True))


def narrowed(model: ir.Model, rank: int) -> ir.Model:
    """A copy whose keys and values are products with weights of a rank; biases stay."""
    copy = model.clone()
    interface = kv_interface(copy)
    assert interface is not None
    facts = infer(copy, believe_names=True)
    for layer in cached_layers(copy, interface, facts)[0].values():
        site = read(layer.node, facts)
        assert site is not None
        for operand in (site.k, site.v):
            product = projection(operand)
            assert product is not None
            value = product.node.inputs[1]
            assert value is not None
            u, s, v = np.linalg.svd(product.weight.numpy().astype(np.float64), full_matrices=False)
            weight = (u[:, :rank] * s[:rank]) @ v[:rank]
            value.const_value = ir.tensor(weight.astype(np.float32), name=value.name)
    return copy


@pytest.mark.export
@pytest.mark.parametrize(("key", "layers"), [*((key, 1) for key in ARCHITECTURES), ("gemma2", 2), ("gptneox", 2)])
def test_a_full_rank_changes_nothing(key: str, layers: int, tmp_path: Path) -> None:
    model = exported(key)
    result = rewritten(model, keys=1.0, values=1.0, layers=layers)
    assert len(details(result)) == 2
    now = kv_interface(result.model)
    assert now is not None
    assert now.layers == 2 // layers
    assert {(pair.heads, pair.operator, pair.axis) for pair in now.pairs} == {(1, "Concat", 2)}
    lowered = optimize(result.model.clone(), "lower", verify="none", assume=ASSUMED)
    pieces = [6, 1, 3, 1]
    for batch in (1, 2):
        expected = steps(model, pieces, batch)
        assert differs(steps(result.model, pieces, batch), expected) < 2e-5
        assert differs(steps(lowered.model, pieces, batch), expected) < 2e-5
    save(lowered.model, tmp_path / "model.onnx")
    save(model, tmp_path / "original.onnx")
    texts = [
        Generator(tmp_path / f"{name}.onnx").generate([[5, 6, 7]], max_new_tokens=8, stop=())
        for name in ("model", "original")
    ]
    assert texts[0] == texts[1]


@pytest.mark.export
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("key", SEPARATE)
def test_products_of_a_rank_are_cached_in_that_rank(key: str, weighted: bool) -> None:
    model = narrowed(exported(key), 5)
    after = rewritten(model, key_rank=5, value_rank=5, weighted=weighted).model
    interface = kv_interface(after)
    assert interface is not None
    assert {pair.head_size for pair in interface.pairs} == {5}
    assert differs(steps(after, [6, 1, 2], 2), steps(model, [6, 1, 2], 2)) < 2e-5


@pytest.mark.export
def test_features_are_made_by_the_projection_itself() -> None:
    after = rewritten(exported("llama"), key_rank=3, value_rank=6).model
    widths = [
        node.inputs[1].shape[1]
        for node in after.graph
        if node.op_type == "MatMul" and len(node.inputs[1].shape or ()) == 2
    ]
    assert widths.count(3) == widths.count(6) == 2


@pytest.mark.parametrize(("layers", "exact"), [(1, False), (1, True), (2, False), (3, False)])
def test_it_generates_as_the_model_of_that_rank_does(layers: int, exact: bool, tmp_path: Path) -> None:
    model = narrowed(parsed(5), 4)
    result = rewritten(model, key_rank=4, value_rank=4, layers=layers, exact=exact)
    save(model, tmp_path / "model.onnx")
    save(optimize(result.model, "lower", verify="none", assume=ASSUMED).model, tmp_path / "after.onnx")
    prompts = [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]
    expected = Generator(tmp_path / "model.onnx").generate(prompts, max_new_tokens=20, stop=())
    generator = Generator(tmp_path / "after.onnx")
    assert generator.cache == "growing"
    assert generator.generate(prompts, max_new_tokens=20, stop=()) == expected
    assert generator.generate(prompts, max_new_tokens=20, stop=(), chunk=2) == expected


def test_neighbours_have_one_cache_and_the_names_move_up(tmp_path: Path) -> None:
    result = rewritten(parsed(5), keys=0.5, values=0.25, layers=2)
    now = kv_interface(result.model)
    assert now is not None
    assert [(pair.past, pair.present, pair.head_size) for pair in now.pairs] == [
        (f"past_key_values.{layer}.{part}", f"present.{layer}.{part}", size // (1 + (layer == 2)))
        for layer in range(3)
        for part, size in (("key", 32), ("value", 16))
    ]
    assert [detail[:53] for detail in details(result)] == [
        *["cached in features of layers 0 to 1 together: keys 32"] * 2,
        *["cached in features of layers 2 to 3 together: keys 32"] * 2,
        details(result)[4][:53],
    ]
    kept = kept_layers(result.model)
    assert kept is not None
    assert (kept.of, kept.kept) == (5, (0, 2, 4))
    save(result.model, tmp_path / "model.onnx")
    again = load(tmp_path / "model.onnx")
    assert kv_interface(again) == now
    assert rename_kv_cache(again) == {}


def test_layers_that_stay_part_their_neighbours() -> None:
    result = rewritten(parsed(5), values=0.5, layers=2, keep=[1])
    now = kv_interface(result.model)
    assert now is not None
    assert [pair.operator for pair in now.pairs[::2]] == ["Concat", "Attention", "Concat", "Concat"]
    assert [pair.head_size for pair in now.pairs[::2]] == [16, 16, 32, 16]
    assert steps(result.model, [5, 1])[1].shape == (1, 1, 41)


def test_a_causal_attribute_becomes_a_mask() -> None:
    model = parsed(2)
    for node in model.graph:
        if node.op_type == "Attention":
            node.replace_input_with(3, None)
            node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    for layers in (1, 2):
        after = rewritten(model, keys=1.0, values=1.0, layers=layers).model
        assert differs(steps(after, [5, 1, 3]), steps(model, [5, 1, 3])) < 1e-5


def test_layers_that_read_the_cache_of_another_read_what_is_rebuilt() -> None:
    model, _ = shared(parsed(3), pairs=[[2, 0]])
    for layers in (1, 2):
        after = rewritten(model, keys=1.0, values=1.0, layers=layers).model
        assert differs(steps(after, [5, 1, 3]), steps(model, [5, 1, 3])) < 1e-5


def test_more_rank_loses_less() -> None:
    model = parsed(2)
    expected = steps(model, [8])[0]
    losses = [
        float(np.square(steps(rewritten(model, keys=part, values=part).model, [8])[0] - expected).sum())
        for part in (0.25, 0.5, 0.75, 1.0)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-6 * losses[0]


def test_ranks_by_energy_and_by_a_part_of_the_cache() -> None:
    model = parsed(3)
    kept = [kv_interface(rewritten(model, energy=energy).model) for energy in (0.9, 0.99, 1.0)]
    sizes = [sum(pair.head_size or 0 for pair in one.pairs) for one in kept if one is not None]
    assert sizes == sorted(set(sizes))
    assert sizes[-1] <= 3 * 2 * 32
    result = rewritten(model, fraction=0.4)
    now = kv_interface(result.model)
    assert now is not None
    assert 0.36 * 192 < sum(pair.head_size or 0 for pair in now.pairs) <= 0.4 * 192
    assert all("lost" in detail for detail in details(result))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keys": 0}, "keys is a part"), ({"values": 1.5}, "values is a part"), ({"energy": 2}, "energy is a part"),
        ({"fraction": -1}, "fraction is a part"), ({"key_rank": 0}, "key_rank"), ({"layers": 0}, "layers"),
        ({"samples": 0}, "samples"), ({"energy": 0.9, "fraction": 0.5}, "several"),
        ({"energy": 0.9, "value_rank": 5}, "several"),
    ],
)  # fmt: skip
def test_options_that_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LowRankKV(**options)


def test_data_is_needed() -> None:
    with pytest.raises(GraphoptError, match="calibration"):
        optimize(parsed(2), {"passes": ["low-rank-kv"]}, verify="none")


@pytest.mark.export
def test_positions_have_to_be_counted() -> None:
    model = exported("llama")
    result = rewritten(model, assume=())
    assert (
        details(result, "left")
        == ["its cache stays: the positions of what is cached aren't known: --assume counted-positions"] * 2
    )
    # Without a length the rotations are computed anew at each step.
    after = rewritten(model, assume=("counted-positions",), keys=1.0, values=1.0).model
    assert differs(steps(after, [6, 1, 2], 2), steps(model, [6, 1, 2], 2)) < 2e-5
    assert "counted-positions" in after.metadata_props["graphopt.assumptions"]


def test_other_caches_are_left() -> None:
    model = ir.from_proto(tiny_decoders.decoder("concat"))
    assert rewritten(model).report.run.records[0].status == "unchanged"
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["": 23]> g (float[2] x) => (float[2] y) { y = Neg(x) }')
    assert not LowRankKV()(model).modified
    model = parsed(2)
    again = rewritten(rewritten(model).model)
    assert details(again) == []


def test_a_cache_whose_sizes_are_read_is_left() -> None:
    model = parsed(2)
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.1.key")
    sizes = ir.node("Shape", [past])
    model.graph.append(sizes)
    sizes.outputs[0].name, sizes.outputs[0].type = "sizes_of_it", ir.TensorType(ir.DataType.INT64)
    model.graph.outputs.append(sizes.outputs[0])
    result = rewritten(model)
    assert details(result, "left") == ["its cache stays: the sizes of its cache are read"]
    assert len(details(result)) == 1


def test_float64_is_left() -> None:
    model = ir.from_proto(tiny_decoders.decoder("attention", dtype="double"))
    result = rewritten(canonical(model))
    assert details(result, "left") == ["its cache stays: it computes in DOUBLE"] * 2


def test_moments_of_half_precision_are_summed_in_floats() -> None:
    """Keys of some hundreds, whose squares are beyond half precision, with queries as much smaller."""
    model = canonical(ir.from_proto(tiny_decoders.decoder("attention", dtype="float16")))
    for name, value in model.graph.initializers.items():
        factor = {"wk": 150.0, "wq": 1 / 150}.get(name[:2])
        if factor is not None and value.const_value is not None:
            value.const_value = ir.tensor((value.const_value.numpy() * factor).astype(np.float16), name=name)
    result = rewritten(model, keys=0.5, values=0.5)
    assert len(details(result)) == 2
    for value in result.model.graph.initializers.values():
        assert value.const_value is not None
        assert np.isfinite(value.const_value.numpy().astype(np.float64)).all()


def test_a_cache_that_may_lose_tokens_is_left() -> None:
    model = optimize(parsed(2), {"passes": ["evictable-kv"]}, verify="none", assume=ASSUMED).model
    result = rewritten(model)
    assert details(result, "left") == ["its cache stays: tokens may be dropped from it (evictable-kv)"] * 2
    assert not details(result)


def test_other_passes_say_why_they_leave_it() -> None:
    model = rewritten(parsed(2)).model
    for recipe in ("lower", "lower+decode"):
        lowered = optimize(model.clone(), recipe, verify="none", assume=ASSUMED)
        told = {
            site.detail for record in lowered.report.run.records for site in record.sites
            if site.outcome == "left" and "features" in site.detail
        }  # fmt: skip
        assert any("rebuilt from features" in detail for detail in told)
        assert differs(steps(lowered.model, [5, 1]), steps(model, [5, 1])) < 1e-5


def test_what_is_written_is_verified() -> None:
    """Against the original the caches can't be compared, and the outputs that can are."""
    recipe = {"passes": [{"low-rank-kv": {"keys": 1.0, "values": 1.0, "layers": 2}}]}
    result = optimize(parsed(4), recipe, verify="pass", calibration=text())
    assert result.report.run.records[0].status == "applied"


def test_caches_of_other_sizes_cant_be_compared() -> None:
    model = parsed(2)
    with pytest.raises(VerificationError, match=r"past_key_values.0.key' is \[batch, 2, past, 16\]"):
        verify(model, rewritten(model).model)


# ---- bases


def drawn(seed: int, size: int, rank: int) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(200, rank)) @ rng.normal(size=(rank, size)) + rng.normal(size=size)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), blocks=st.integers(1, 3), rank=st.integers(1, 12), weighted=st.booleans())
def test_a_basis_loses_what_it_says_and_no_other_of_its_rank_loses_less(
    seed: int, blocks: int, rank: int, weighted: bool
) -> None:
    size = 4 * blocks
    rows = drawn(seed, size, min(rank, size))
    rng = np.random.default_rng(seed + 1)
    halves = rng.normal(size=(blocks, 4, 4))
    weights = halves @ halves.transpose(0, 2, 1) if weighted else None
    found = spectrum(rows.T @ rows / len(rows), rows.mean(axis=0), weights)
    whole = np.zeros((size, size))
    for index in range(blocks):
        own = slice(4 * index, 4 * index + 4)
        whole[own, own] = np.eye(4) if weights is None else weights[index]
    centred = rows - rows.mean(axis=0)

    def loss(encoder: npt.NDArray[Any], decoder: npt.NDArray[Any]) -> float:
        error = centred - centred @ encoder @ decoder
        return float(np.einsum("ni,ij,nj->", error, whole, error)) / float(
            np.einsum("ni,ij,nj->", centred, whole, centred)
        )

    lost = [found.lost(r) for r in range(size + 1)]
    assert lost == sorted(lost, reverse=True)
    for r in range(1, size + 1):
        basis = found.basis(r)
        assert basis.rank == r
        own = loss(basis.encoder, basis.decoder)
        assert abs(own - found.lost(r)) < 1e-3
        other = rng.normal(size=(size, r))
        fitted = np.linalg.lstsq(centred @ other, centred, rcond=None)[0]
        assert own <= loss(other, fitted) + 1e-3
    assert loss(found.whole.encoder, found.whole.decoder) < 1e-9
    assert found.lost(min(rank, size)) < 1e-9
    assert found.lost(found.rank_for(0.9)) <= 0.1 + 1e-9


@pytest.mark.export
@pytest.mark.parametrize("key", ["llama", "gptj", "gptneox"])
def test_moments_are_those_of_what_the_attention_reads(key: str) -> None:
    """Of queries turned by the distance, whose moments are those of their scores on keys before their rotation."""
    model = exported(key)
    interface = kv_interface(model)
    assert interface is not None
    facts = infer(model, believe_names=True)
    layer = cached_layers(model, interface, facts)[0][1]
    site = read(layer.node, facts)
    assert site is not None
    samples = list(text().feeds(model))
    (found,) = gathered(model, [[site]], samples, 1, attended=False)
    names = {"q": layer.node.inputs[0], "k": layer.node.inputs[1], "v": layer.node.inputs[2]}
    copy = model.clone()
    values = {v.name: v for node in copy.graph for v in node.outputs}
    copy.graph.outputs.extend(values[v.name] for v in names.values() if v is not None)
    queries, keys, rows = [], [], []
    for sample in samples:
        given = run(copy, dict(sample))
        q, k, v = (given[value.name or ""] for value in names.values() if value is not None)
        queries.append(q), keys.append(k), rows.append(v.transpose(0, 2, 1, 3).reshape(-1, site.kv_heads * site.depth))
    values_ = np.concatenate(rows)
    assert np.abs(found.values - values_.T @ values_ / len(values_)).max() < 1e-4 * np.abs(found.values).max()
    assert np.abs(found.value_mean - values_.mean(axis=0)).max() < 1e-4
    # Turning keeps lengths: the energy of keys and queries is that of the rotated ones.
    for moments, parts in ((found.keys, keys), (found.asked, queries)):
        total = np.trace(moments, axis1=-2, axis2=-1).sum()
        expected = np.mean([np.square(part).sum(axis=(1, 3)).mean() for part in parts])
        assert abs(total - expected) < 1e-3 * expected
