"""predict-kv and couple-kv: exact where codes lose nothing, what they fit, and what is left alone."""

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
sys.path.insert(0, str(Path(__file__).parents[1] / "quantize"))

import tiny_decoders
from smollm2_layers import VOCABULARY, first_layers
from test_low_rank_kv import details, differs, steps
from test_share_kv import ASSUMED, exported, made_equal, parsed, run, shared, told

from graphopt.api import Result, canonical, optimize
from graphopt.calibration.text import TextDataset
from graphopt.errors import GraphoptError
from graphopt.graph.edits import Editor, sort
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.passes.clean.fold_constants import FoldConstants
from graphopt.passes.fold.weight_subgraphs import FoldWeightSubgraphs
from graphopt.passes.kv.cache_codes import Codebook, Plain, Residual
from graphopt.passes.kv.codebook_fit import fitted_codebook
from graphopt.passes.kv.coded_writer import Coding
from graphopt.passes.kv.couple_kv import CoupleKV
from graphopt.passes.kv.feature_bases import Basis
from graphopt.passes.kv.predict_kv import PredictKV, fitted
from graphopt.passes.quantize.gaussian_grids import gaussian_vectors, nearest_vectors
from graphopt.passes.quantize.rotations import hadamard
from graphopt.runtime_ops.generation import Generator

PIECES = [6, 1, 3, 1]
Floats = npt.NDArray[Any]


def random_text(tokens: int = 64, window: int = 16, vocabulary: int = 41, seed: int = 0) -> TextDataset:
    return TextDataset(np.random.default_rng(seed).integers(0, vocabulary, tokens), window)


def same_text(batch: int = 1) -> TextDataset:
    """What `steps` feeds, row by row."""
    rng = np.random.default_rng(5)
    tokens = np.concatenate([rng.integers(3, 40, size=(batch, count)) for count in PIECES], axis=1)
    return TextDataset(tokens.reshape(-1), sum(PIECES))


def coded(
    name: str, model: ir.Model, text: TextDataset | None = None, assume: tuple[str, ...] = ASSUMED, **options: Any
) -> Result:
    recipe = {"passes": [{name: options}]}
    text = text or random_text()
    return optimize(model.clone(), recipe, verify="none", calibration=text, assume=assume)


@pytest.mark.export
@pytest.mark.parametrize("key", ["llama", "gpt2", "gptbigcode"])
def test_vectors_that_are_in_the_codebooks_are_exact(key: str, tmp_path: Path) -> None:
    model = exported(key)
    result = coded("couple-kv", model, same_text(2), keys=4, values=2)
    assert len(details(result)) == 2
    now = kv_interface(result.model)
    assert now is not None
    assert {(pair.heads, pair.dtype, pair.operator, pair.axis) for pair in now.pairs} == {(1, "UINT8", "Concat", 2)}
    lowered = optimize(result.model.clone(), "lower", verify="none", assume=ASSUMED).model
    expected = steps(model, PIECES, 2)
    assert differs(steps(result.model, PIECES, 2), expected) < 2e-5
    assert differs(steps(lowered, PIECES, 2), expected) < 2e-5
    save(lowered, tmp_path / "model.onnx")
    assert kv_interface(load(tmp_path / "model.onnx")) == kv_interface(lowered)
    generator = Generator(tmp_path / "model.onnx")
    whole = generator.generate([[5, 6, 7, 8]], max_new_tokens=5, stop=())
    assert generator.cache == "growing"
    assert generator.generate([[5, 6, 7, 8]], max_new_tokens=5, stop=(), chunk=1) == whole


def by_hand(model: ir.Model, number_of: int) -> list[tuple[Coding, Coding]]:
    """Features of the first layer as they are, and those of the others foreseen by the keys and values before."""
    size = 32
    turned = Basis.of_blocks(np.stack([hadamard(16).T.astype(np.float64)] * 2))
    codes = Codebook(size, gaussian_vectors(4, 256)[None], None, 2)
    found = [(Coding(turned, Plain(size)), Coding(turned, Plain(size)))]
    for number in range(1, number_of):
        keys = Residual(codes, ((number - 1, 0),), np.eye(size), np.zeros(size))
        both = np.concatenate([np.zeros((size, size)), np.eye(size)])
        values = Residual(codes, ((number, 0), (number - 1, 1)), both, np.zeros(size))
        found.append((Coding(turned, keys), Coding(turned, values)))
    return found


@pytest.mark.parametrize("causal", [False, True])
def test_what_is_foreseen_is_exact(causal: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keys and values that are those of the layer before, which are cached as they are."""
    model = parsed(3)
    if causal:
        for node in model.graph:
            if node.op_type == "Attention":
                node.replace_input_with(3, None)
                node.attributes["is_causal"] = ir.AttrInt64("is_causal", 1)
    equal = made_equal(made_equal(model, 1, 0), 2, 0)
    monkeypatch.setattr(PredictKV, "codings", lambda self, of, groups, samples, facts: by_hand(of, len(groups)))
    result = coded("predict-kv", equal)
    now = kv_interface(result.model)
    assert now is not None
    assert now.problems == ()
    assert [(p.layer, p.part, p.dtype, p.head_size) for p in now.pairs] == [
        (layer, part, "UINT8" if layer else "FLOAT", 10 if layer else 32)
        for layer in range(3) for part in ("key", "value")
    ]  # fmt: skip
    for batch in (1, 2):
        assert differs(steps(result.model, PIECES, batch), steps(equal, PIECES, batch)) < 5e-5
    lowered = optimize(result.model.clone(), "lower", verify="none", assume=ASSUMED).model
    assert differs(steps(lowered, PIECES, 2), steps(equal, PIECES, 2)) < 5e-5
    for name, one in (("equal", equal), ("model", lowered)):
        sort(one)
        save(one, tmp_path / f"{name}.onnx")
    texts = [
        Generator(tmp_path / f"{name}.onnx").generate([[1, 2, 3], [3, 2, 1]], max_new_tokens=12, stop=())
        for name in ("equal", "model")
    ]
    assert texts[0] == texts[1]


@pytest.mark.export
@pytest.mark.parametrize("key", ["llama", "qwen3"])
def test_more_bytes_lose_less(key: str) -> None:
    model = exported(key)
    expected = steps(model, PIECES, 2)
    for name, channels in (("predict-kv", (4, 2, 1)), ("couple-kv", (8, 4, 1))):
        losses = []
        for count in channels:
            options = {"keys": count, "values": count, **({"first": count} if name == "predict-kv" else {})}
            result = coded(name, model, random_text(seed=1, tokens=512), **options)
            assert len(details(result)) == 2
            losses.append(differs(steps(result.model, PIECES, 2), expected))
        assert losses == sorted(losses, reverse=True)
        assert losses[-1] < 0.5 * losses[0]


def test_chunks_of_a_prompt_change_nothing() -> None:
    """Tokens of a run are read back from their codes too, so that it doesn't matter how they came."""
    for name in ("predict-kv", "couple-kv"):
        after = coded(name, parsed(3)).model
        whole = steps(after, [11])[0]
        parts = np.concatenate(steps_of_same(after, PIECES), axis=1)
        assert differs([parts], [whole]) < 1e-4


def steps_of_same(model: ir.Model, pieces: list[int]) -> list[Floats]:
    """As `steps`, of the text that comes in one piece there."""
    interface = kv_interface(model)
    assert interface is not None
    ids = np.random.default_rng(5).integers(3, 40, size=(1, sum(pieces)))
    caches = {pair.past: np.zeros((1, 1, 0, pair.head_size or 0), np.uint8) for pair in interface.pairs}
    past, found = 0, []
    for count in pieces:
        given_out = run(model, {**caches, **told(interface, ids[:, past : past + count], past)})
        caches = {pair.past: given_out[pair.present or ""] for pair in interface.pairs}
        found.append(given_out[interface.logits or ""])
        past += count
    return found


def test_layers_that_read_the_cache_of_another_read_what_is_rebuilt() -> None:
    model, _ = shared(parsed(3), pairs=[[2, 0]])
    result = coded("couple-kv", model, same_text(), keys=4, values=4)
    assert len(details(result)) == 2
    assert differs(steps(result.model, PIECES), steps(model, PIECES)) < 2e-5
    result = coded("predict-kv", model, first=1)
    assert len(details(result)) == 2
    assert differs(steps(result.model, PIECES), steps(model, PIECES)) < 0.5


def test_half_precision() -> None:
    model = canonical(ir.from_proto(tiny_decoders.decoder("attention", dtype="float16")))
    expected = steps(model, PIECES)
    for name, options in (("predict-kv", {"first": 1}), ("couple-kv", {})):
        after = coded(name, model, same_text(), keys=1, values=1, **options).model
        now = kv_interface(after)
        assert now is not None
        assert {pair.dtype for pair in now.pairs} == {"UINT8"}
        assert differs(steps(after, PIECES), expected) < 0.1


def test_what_is_left() -> None:
    model = parsed(2)
    result = coded("couple-kv", model, keys=3)
    assert details(result, "left") == ["its cache stays: 3 channels a byte don't divide a head of 16"] * 2
    result = coded("predict-kv", model, keep=[0])
    assert [detail[:42] for detail in details(result)] == ["cached as residuals: keys 18 bytes a token"]
    for recipe in ("lower", "lower+decode"):
        lowered = optimize(coded("predict-kv", model).model, recipe, verify="none", assume=ASSUMED)
        records = lowered.report.run.records
        reasons = {site.detail for record in records for site in record.sites if site.outcome == "left"}
        assert any("rebuilt from features" in reason for reason in reasons)
    again = coded("couple-kv", coded("predict-kv", model).model)
    assert details(again) == []
    for name in ("predict-kv", "couple-kv"):
        with pytest.raises(GraphoptError, match="calibration"):
            optimize(model.clone(), {"passes": [name]}, verify="none")


def test_what_is_written_is_verified() -> None:
    for name in ("predict-kv", "couple-kv"):
        recipe = {"passes": [{name: {"keys": 1, "values": 1}}]}
        result = optimize(parsed(2), recipe, verify="pass", calibration=random_text())
        assert result.report.run.records[0].status == "applied"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keys": 3}, "keys is the channels"),
        ({"first": 0}, "first is"),
        ({"ridge": 0}, "ridge"),
        ({"samples": 0}, "sam"),
    ],
)
def test_options_of_prediction_that_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        PredictKV(**options)


def test_options_of_codebooks_that_are_refused() -> None:
    with pytest.raises(ValueError, match="values is the channels"):
        CoupleKV(values=0)


# ---- what is fitted


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000), channels=st.sampled_from([1, 2, 4]), scales=st.sampled_from([0, 2]), each=st.booleans(),
    metric=st.booleans(),
)  # fmt: skip
def test_codes_in_the_graph_are_those_that_are_fitted_on(
    seed: int, channels: int, scales: int, each: bool, metric: bool
) -> None:
    rng = np.random.default_rng(seed)
    size = 8
    count = size // channels if each else 1
    halves = rng.normal(size=(count, channels, channels))
    metrics = halves @ halves.transpose(0, 2, 1) + 0.1 * np.eye(channels) if metric else None
    book = Codebook(size, rng.normal(size=(count, 256, channels)).astype(np.float32), metrics, scales)
    rows = (rng.normal(size=(12, size)) * 10 ** rng.uniform(-2, 2, (12, 1))).astype(np.float32)
    given_in, past = (ir.Value(name=name, type=ir.TensorType(dtype)) for name, dtype in (
        ("rows", ir.DataType.FLOAT), ("past", ir.DataType.UINT8)))  # fmt: skip
    given_in.shape, past.shape = ir.Shape([2, 1, 6, size]), ir.Shape([2, 1, "past", book.width])
    end = ir.node("Identity", [given_in])
    model = ir.Model(ir.Graph([given_in, past], [], nodes=[end], opset_imports={"": 23}, name="codes"), ir_version=10)
    edit = Editor(model)
    edit.at(end)
    whole, features = book.write(given_in, past, {}, edit)
    for value, name, dtype in ((whole, "whole", ir.DataType.UINT8), (features, "features", ir.DataType.FLOAT)):
        value.name, value.type = name, ir.TensorType(dtype)
        model.graph.outputs.append(value)
    held = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value is not None)
    # Beside the vectors: M, sizes, and the numbers of the scales.
    assert held < book.tables.size + (0 if metrics is None else metrics.size) + (560 if scales else 40)
    rules = FoldConstants(), FoldWeightSubgraphs()
    for rule in rules:
        rule(model)
        assert not any("larger" in site.detail for site in rule.sites)
    found = run(model, {"rows": rows.reshape(2, 1, 6, size), "past": np.zeros((2, 1, 0, book.width), np.uint8)})
    assert found["whole"].shape == (2, 1, 6, book.width)
    assert np.allclose(found["features"].reshape(12, size), book.stored(rows), rtol=1e-4, atol=1e-6)
    later = run(model, {"rows": rows.reshape(2, 1, 6, size), "past": found["whole"]})
    assert np.array_equal(later["features"][:, :, :6], later["features"][:, :, 6:])


def test_a_linear_function_is_found() -> None:
    rng = np.random.default_rng(0)
    x, weight, shift = rng.normal(size=(200, 6)), rng.normal(size=(6, 4)), rng.normal(size=4)
    found, begun = fitted(x, x @ weight + shift, 1e-9)
    assert np.allclose(found, weight, atol=1e-6)
    assert np.allclose(begun, shift, atol=1e-6)
    # Nothing to foresee from: the mean.
    found, begun = fitted(np.zeros((200, 0)), x, 1e-3)
    assert found.shape == (0, 6)
    assert np.allclose(begun, x.mean(axis=0))
    assert np.isfinite(fitted(np.zeros((200, 3)), x, 1e-3)[0]).all()


def test_codebooks() -> None:
    rng = np.random.default_rng(0)
    few = rng.normal(size=(200, 4)).astype(np.float32)
    table = fitted_codebook(np.concatenate([few, few]), None, None, 0)
    assert table.shape == (256, 4)
    assert np.array_equal(np.unique(table, axis=0), np.unique(few, axis=0))
    rows = rng.normal(size=(3000, 2)).astype(np.float32)
    rows[:, 1] += 3 * rows[:, 0]

    def loss(one: Floats, counts: Floats, metric: Floats | None = None) -> float:
        error = rows - one[nearest_vectors(rows, one.astype(np.float32), metric)]
        return float((counts * (error * (error if metric is None else error @ metric)).sum(axis=1)).sum())

    alike, heavy = np.ones(len(rows)), np.where(rows[:, 0] > 1.5, 100.0, 1.0)
    plain = fitted_codebook(rows, None, None, 0)
    # Channels that depend on each other have fewer states than each by itself, of 16 levels.
    levels = np.stack([np.quantile(rows[:, at], (np.arange(16) + 0.5) / 16) for at in (0, 1)], axis=1)
    grid = np.stack(np.meshgrid(levels[:, 0], levels[:, 1], indexing="ij"), axis=-1).reshape(-1, 2)
    assert loss(plain, alike) < 0.6 * loss(grid, alike)
    assert loss(fitted_codebook(rows, heavy, None, 0), heavy) < 0.7 * loss(plain, heavy)
    metric = np.diag([10.0, 0.1])
    assert loss(fitted_codebook(rows, None, metric, 0), alike, metric) < 0.8 * loss(plain, alike, metric)


@pytest.mark.real
def test_on_the_first_layers_of_a_trained_model() -> None:
    """Of SmolLM2: the residual is smaller than keys and values, and codebooks lose less than rounding by channel."""
    model = first_layers(3, cached=True)
    text = random_text(2048, 128, VOCABULARY)
    told = details(coded("predict-kv", model, text, assume=("counted-positions",), samples=16))
    assert len(told) == 3
    for detail in told[1:]:
        unforeseen = [int(part.split("%")[0].split()[-1]) for part in detail.split(", ") if "unforeseen" in part]
        assert max(unforeseen) < 75
    lost = [[float(part.split("%")[0].split()[-1]) for part in detail.split(", ") if "lost" in part] for detail in told]
    # In as many bytes, 2 bits and one for a scale, without a prediction.
    alone = details(coded("predict-kv", model, text, assume=("counted-positions",), samples=16, first=4))
    first = [float(part.split("%")[0].split()[-1]) for part in alone[0].split(", ") if "lost" in part]
    assert max(lost[1] + lost[2]) < min(first)
    told = details(coded("couple-kv", model, text, assume=("counted-positions",), weighted=False))
    assert len(told) == 3
    for detail in told:
        for part in detail.split(", "):
            if "lost" in part:
                # 2 bits with the best four levels for normal numbers of each channel leave 12 %.
                assert float(part.split("%")[0].split()[-1]) < 11.7
