"""share-heads: heads with the matrices of a head of another layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given as examples
from hypothesis import settings
from hypothesis import strategies as st
from tied_models import ALL, assert_same, given, made, weight_bytes
from tiny_decoders import decoder
from zeroed import outputs

import graphopt
from graphopt.analysis.shapes import infer
from graphopt.errors import UsageError
from graphopt.graph.save import save
from graphopt.passes.clean.fold_constants import FoldConstants
from graphopt.passes.depth.head_matrices import HeadGroup, head_groups
from graphopt.passes.depth.share_heads import ShareHeads


def groups_of(model: ir.Model) -> list[HeadGroup]:
    return head_groups(model, infer(model, believe_names=True))[0]


def copied(model: ir.Model, head: str, donor: str, matrices: str = "qkv") -> None:
    """Write the matrices of one head over those of another."""
    known = {group.name: group for group in groups_of(model)}
    for role in matrices:
        for piece, source in zip(getattr(known[head], role), getattr(known[donor], role), strict=True):
            pairs = [(piece.weight, source.weight)]
            if piece.bias is not None:
                pairs.append(tuple(one.bias.node.inputs[one.bias.index] for one in (piece, source)))
            for own, other in pairs:
                array = np.array(own.const_value.numpy())
                array[..., piece.start : piece.stop] = other.const_value.numpy()[..., source.start : source.stop]
                own.const_value = ir.tensor(array, name=own.name)


@pytest.mark.export
@pytest.mark.parametrize("name", ALL)
def test_equal_heads_are_found_and_stored_once(name: str, tmp_path: Path) -> None:
    model = made(name)
    groups = groups_of(model)
    first = next(g for g in groups if g.form == groups[-1].form)
    copied(model, groups[-1].name, first.name)
    expected = outputs(model, given(name))
    before = weight_bytes(model)
    shared = model.clone()
    step = ShareHeads(fraction=1.01 / len(groups), matrices="qkv")
    assert step(shared).modified
    assert step.pairs == {groups[-1].name: first.name}
    assert_same(outputs(shared, given(name)), expected)
    pieces = [*first.q, *first.k, *first.v]
    size = sum(32 * (piece.stop - piece.start) * 4 for piece in pieces)
    assert size - 64 <= before - weight_bytes(shared) <= size
    assert step.saved == before - weight_bytes(shared)
    save(shared, tmp_path / "shared.onnx")
    onnx.checker.check_model(tmp_path / "shared.onnx")
    # Nothing is folded back into matrices that hold the head twice.
    FoldConstants(max_bytes=0)(shared)
    assert step.saved == before - weight_bytes(shared)


@pytest.mark.export
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "bert"])
@pytest.mark.parametrize("matrices", ["qk", "qkv"])
def test_the_result_is_the_model_with_copied_heads(name: str, matrices: str) -> None:
    model = made(name)
    pairs = {"1.0": "0.1", "2.1": "0.1", "2.0": "1.1"}
    shared = model.clone()
    ShareHeads(matrices=matrices, pairs=pairs)(shared)  # type: ignore[arg-type]
    for head, donor in pairs.items():
        copied(model, head, donor, matrices)
    assert_same(outputs(shared, given(name)), outputs(model, given(name)), 1e-6)


@pytest.mark.export
def test_a_head_of_keys_goes_with_its_queries() -> None:
    model = made("llama")
    groups = groups_of(model)
    assert [group.name for group in groups] == [f"{layer}.{group}" for layer in range(3) for group in range(2)]
    assert [[(p.start, p.stop) for p in pieces] for pieces in (groups[1].q, groups[1].k, groups[1].v)] == [
        [(16, 32)], [(8, 16)], [(8, 16)],
    ]  # fmt: skip


@pytest.mark.export
def test_columns_of_joined_products_are_followed() -> None:
    third = groups_of(made("gpt2"))[2]
    assert [(p.start, p.stop) for p in (*third.q, *third.k, *third.v)] == [(16, 24), (48, 56), (80, 88)]
    third = groups_of(made("neox"))[2]
    assert [(p.start, p.stop) for p in (*third.q, *third.k, *third.v)] == [(48, 56), (56, 64), (64, 72)]


@pytest.mark.export
def test_a_decoder_with_shared_heads_generates(tmp_path: Path) -> None:
    model = made("llama")
    copied(model, "2.0", "0.1")
    save(model, tmp_path / "whole.onnx")
    ShareHeads(pairs={"2.0": "0.1"})(model)
    save(model, tmp_path / "shared.onnx")
    texts = [
        graphopt.Generator(tmp_path / f"{file}.onnx", threads=1).generate([[5, 6, 7]], max_new_tokens=6)
        for file in ("whole", "shared")
    ]
    assert texts[0] == texts[1]


@settings(max_examples=20, deadline=None)
@examples(st.dictionaries(st.sampled_from(["1.0", "1.1", "2.0", "2.1"]), st.sampled_from(["0.0", "0.1"]), min_size=1))
def test_any_heads_can_be_shared(pairs: dict[str, str]) -> None:
    model = ir.from_proto(decoder("attention", layers=3))
    before = weight_bytes(model)
    shared = model.clone()
    step = ShareHeads(matrices="qkv", pairs=dict(pairs))
    step(shared)
    for head, donor in pairs.items():
        copied(model, head, donor)
    rng = np.random.default_rng(0)
    arrays = {
        "input_ids": np.array([[1, 2]]), "attention_mask": np.ones((1, 5), np.int64),
        **{f"past_key_values.{i}.{part}": rng.normal(size=(1, 2, 3, 16)).astype(np.float32)
           for i in range(3) for part in ("key", "value")},
    }  # fmt: skip
    assert_same(outputs(shared, arrays), outputs(model, arrays), 1e-6)
    assert before - weight_bytes(shared) == len(pairs) * 64 * 64 * 4


@pytest.mark.export
def test_wrong_options_are_told() -> None:
    for options, message in (
        ({"fraction": 0}, "between 0 and 1"),
        ({"matrices": "v"}, "matrices is one of"),
        ({"pairs": ["1.0"]}, "such as"),
    ):
        with pytest.raises(ValueError, match=message):
            ShareHeads(**options)  # type: ignore[arg-type]
    model = ir.from_proto(decoder("attention", layers=2))
    for pairs, message in (
        ({"1.0": "7.0"}, "no head '7.0'"),
        ({"1.0": "0.0", "0.0": "1.1"}, "another's matrices itself"),
    ):
        with pytest.raises(UsageError, match=message):
            ShareHeads(pairs=pairs)(model.clone())  # type: ignore[arg-type]


def test_a_matrix_that_others_read_stays() -> None:
    model = ir.from_proto(decoder("attention", layers=2))
    second = next(n for n in model.graph if n.op_type == "MatMul" and n.inputs[1] and n.inputs[1].name == "wk1")
    second.replace_input_with(1, model.graph.initializers["wk0"])
    step = ShareHeads(fraction=0.5)
    assert not step(model).modified
    assert {site.detail for site in step.sites} == {"the matrix of its heads is read elsewhere, too"}
