"""Roundings: what holds for all weights, and their objective on real ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.models.catalogue import fetch
from graphopt.passes.quantize import roundings
from graphopt.passes.quantize.coordinate_descent import coordinate_descent
from graphopt.passes.quantize.gptq import gptq
from graphopt.passes.quantize.grids import Grid, UniformGrid
from graphopt.passes.quantize.outliers import largest
from graphopt.passes.quantize.quantized_weight import QuantizedWeight
from graphopt.passes.quantize.rotations import hadamard
from graphopt.passes.quantize.roundings import objective, quantize, round_to_nearest

Array = npt.NDArray[Any]
Rng = np.random.Generator

ROUNDINGS = ("nearest", "gptq", "comq", "gptq+comq")
ORDERS = ("activation", "groups", "natural")
KINDS = ("symmetric", "integers", "floats")

seeds = st.integers(0, 2**32 - 1)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 70), st.integers(1, 80))
"""N, K and the group size."""


def uniform(kind: str, bits: int = 4, *, search: bool = False) -> UniformGrid:
    return UniformGrid(bits, symmetric=kind == "symmetric", floats=kind == "floats", search=search)


grids = st.builds(
    lambda kind, bits, search: uniform(kind, bits, search=search),
    st.sampled_from(KINDS),
    st.integers(2, 8),
    st.booleans(),
)


def a_weight(rng: Rng, rows: int, columns: int) -> Array:
    return (rng.standard_t(4, (rows, columns)) * np.exp(rng.standard_normal(columns))).astype(np.float32)


def a_hessian(rng: Rng, columns: int, tokens: int) -> Array:
    """Of inputs that hang together; of less than full rank where there are fewer tokens than columns."""
    inputs = rng.standard_normal((tokens, columns)) @ (rng.standard_normal((columns, columns)) + 3 * np.eye(columns))
    inputs *= np.exp(rng.standard_normal(columns))
    return (inputs.T @ inputs).astype(np.float32)


@pytest.fixture(scope="module")
def layers() -> dict[str, tuple[Array, Array]]:
    """Half of the columns of two weights of SmolLM2's first layer, the gain of the norm folded in, which takes them off
    the file's 4-bit grid, with the Hessian of the normalized embeddings of 1500 tokens."""
    gguf = pytest.importorskip("gguf")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(str(fetch("smollm2"))).tensors}

    def numbers(name: str, rows: slice = slice(None)) -> Array:
        tensor = tensors[name]
        return np.asarray(gguf.quants.dequantize(tensor.data[rows], tensor.tensor_type), np.float32)

    embeddings = numbers("token_embd.weight", slice(300, 48_300, 32))
    inputs = embeddings / np.sqrt((embeddings**2).mean(axis=1, keepdims=True) + 1e-5)
    found = {}
    for name, norm in (("attn_q", "attn_norm"), ("ffn_up", "ffn_norm")):
        weight = numbers(f"blk.0.{name}.weight")[:192] * numbers(f"blk.0.{norm}.weight")
        found[name] = (np.ascontiguousarray(weight[:, :288]), inputs[:, :288].T @ inputs[:, :288])
    return found


@pytest.mark.real
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["attn_q", "ffn_up"])
def test_objective_on_real_weights(layers: dict[str, tuple[Array, Array]], name: str, kind: str, bits: int) -> None:
    weight, hessian = layers[name]
    grid = uniform(kind, bits, search=True)
    loss = {
        rounding: objective(weight, quantize(weight, grid, 32, rounding, hessian=hessian), hessian)
        for rounding in ROUNDINGS
    }
    for order in ORDERS:
        assert objective(weight, gptq(weight, grid, 32, hessian, order=order), hessian) < loss["nearest"]
    assert loss["gptq"] < 0.8 * loss["nearest"]
    assert loss["comq"] < 0.8 * loss["nearest"]
    assert loss["gptq+comq"] < loss["gptq"]


@pytest.mark.real
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_outliers_on_real_weights(layers: dict[str, tuple[Array, Array]], bits: int) -> None:
    weight, hessian = layers["attn_q"]
    grid = uniform("symmetric", bits, search=True)
    identity = np.eye(weight.shape[1], dtype=np.float32)
    plain, kept = (quantize(weight, grid, weight.shape[1], outliers=share) for share in (0.0, 0.01))
    assert objective(weight, kept, identity) < 0.9 * objective(weight, plain, identity)
    for rounding in ("gptq", "comq", "gptq+comq"):
        plain, kept = (quantize(weight, grid, 32, rounding, hessian=hessian, outliers=share) for share in (0.0, 0.01))
        assert objective(weight, kept, hessian) < objective(weight, plain, hessian)


@settings(deadline=None, max_examples=40)
@given(seed=seeds, shape=shapes, grid=grids, rounding=st.sampled_from(ROUNDINGS), order=st.sampled_from(ORDERS))
def test_every_shape_gets_codes_of_the_grid(
    seed: int, shape: tuple[int, int, int], grid: UniformGrid, rounding: Any, order: Any
) -> None:
    rows, columns, group_size = shape
    rng = np.random.default_rng(seed)
    weight, hessian = a_weight(rng, rows, columns), a_hessian(rng, columns, int(rng.integers(1, 2 * columns + 1)))
    given_hessian = hessian.copy()
    made = quantize(
        weight, grid, group_size, rounding, hessian=hessian, order=order, outliers=float(rng.choice([0, 0.05]))
    )
    assert made.codes.dtype == np.uint8
    assert made.codes.max() < 1 << grid.bits
    assert made.codes.shape == weight.shape
    assert made.scales.shape == (rows, -(-columns // group_size))
    assert np.isfinite(made.numbers()).all()
    assert (hessian == given_hessian).all()


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds,
    shape=shapes,
    kind=st.sampled_from(["symmetric", "floats"]),
    bits=st.integers(2, 8),
    search=st.booleans(),
)
def test_what_lies_on_the_grid_stays(
    seed: int, shape: tuple[int, int, int], kind: str, bits: int, search: bool
) -> None:
    rows, columns, group_size = shape
    grid = uniform(kind, bits)
    first = round_to_nearest(a_weight(np.random.default_rng(seed), rows, columns), grid, group_size).numbers()
    again = round_to_nearest(first, dataclasses.replace(grid, search=search), group_size).numbers()
    np.testing.assert_allclose(again, first, rtol=0, atol=1e-5 * np.abs(first).max())


@settings(deadline=None, max_examples=40)
@given(seed=seeds, shape=shapes, grid=grids, order=st.sampled_from(ORDERS))
def test_inputs_that_do_not_hang_together_leave_gptq_with_nearest(
    seed: int, shape: tuple[int, int, int], grid: UniformGrid, order: Any
) -> None:
    rows, columns, group_size = shape
    rng = np.random.default_rng(seed)
    weight = a_weight(rng, rows, columns)
    cares = np.exp(rng.standard_normal(columns)).astype(np.float32)
    nearest = round_to_nearest(weight, grid, group_size, cares)
    for diagonal in (np.ones(columns), np.exp(rng.standard_normal(columns)), np.zeros(columns)):
        made = gptq(weight, grid, group_size, np.diag(diagonal), order=order, importance=cares)
        assert (made.codes == nearest.codes).all()
        assert (made.scales == nearest.scales).all()


@settings(deadline=None, max_examples=40)
@given(seed=seeds, shape=shapes, grid=grids, rounding=st.sampled_from(ROUNDINGS), order=st.sampled_from(ORDERS))
def test_rows_do_not_touch_each_other(
    seed: int, shape: tuple[int, int, int], grid: UniformGrid, rounding: Any, order: Any
) -> None:
    rows, columns, group_size = shape
    rng = np.random.default_rng(seed)
    weight, hessian = a_weight(rng, rows, columns), a_hessian(rng, columns, 2 * columns)
    turned = rng.permutation(rows)
    made = quantize(weight, grid, group_size, rounding, hessian=hessian, order=order).numbers()
    other = quantize(weight[turned], grid, group_size, rounding, hessian=hessian, order=order).numbers()
    # Sums of products depend in their last bits on where a row stands; a tie may fall otherwise for that.
    assert np.isclose(made[turned], other, rtol=1e-4, atol=1e-6).mean() > 0.9


@settings(deadline=None, max_examples=40)
@given(seed=seeds, rows=st.integers(1, 5), columns=st.integers(2, 70), kind=st.sampled_from(KINDS))
def test_the_order_of_the_columns_does_not_matter_where_activations_give_it(
    seed: int, rows: int, columns: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    weight, hessian = a_weight(rng, rows, columns), a_hessian(rng, columns, 2 * columns)
    turned = rng.permutation(columns)
    made = gptq(weight, uniform(kind), columns, hessian)
    other = gptq(weight[:, turned], uniform(kind), columns, hessian[np.ix_(turned, turned)])
    assert (made.codes[:, turned] == other.codes).all()


@settings(deadline=None, max_examples=40)
@given(
    seed=seeds, shape=shapes, grid=grids, start=st.sampled_from(["nearest", "gptq"]), share=st.sampled_from([0, 0.05])
)
def test_coordinate_descent_never_raises_the_objective(
    seed: int, shape: tuple[int, int, int], grid: UniformGrid, start: Any, share: float
) -> None:
    rows, columns, group_size = shape
    rng = np.random.default_rng(seed)
    weight, hessian = a_weight(rng, rows, columns), a_hessian(rng, columns, int(rng.integers(1, 2 * columns + 1)))
    made = quantize(weight, grid, group_size, start, hessian=hessian, outliers=share)
    noise = 1e-6 * float(np.sum((weight @ hessian) * weight))
    before = objective(weight, made, hessian)
    for refit in (False, True):
        after = coordinate_descent(weight, grid, group_size, hessian, made, sweeps=2, refit=refit)
        assert objective(weight, after, hessian) <= before * (1 + 1e-4) + noise
        if not refit:
            assert (after.scales == made.scales).all()


@pytest.mark.real
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [3, 4])
def test_grids_fitted_to_what_errors_cost(layers: dict[str, tuple[Array, Array]], bits: int, order: Any) -> None:
    grid = uniform("floats", bits, search=True)
    for weight, hessian in layers.values():
        diagonal = np.diagonal(hessian).astype(np.float32)
        same = np.ones_like(diagonal)
        even, naive, own = (
            objective(weight, gptq(weight, grid, 32, hessian, order=order, importance=cares), hessian)
            for cares in (same, diagonal / diagonal.mean(), None)
        )
        assert own < 0.97 * naive
        assert own < 1.02 * even


def by_the_inverse(weight: Array, grid: Grid, group_size: int, hessian: Array, order: Array, damping: float) -> Array:
    """GPTQ as OBQ states it: after each column all later ones move along the inverse Hessian of those that are left."""
    moving = weight.astype(np.float64)
    gram = hessian.astype(np.float64) + damping * np.diagonal(hessian).mean() * np.eye(len(hessian))
    codes = np.zeros(weight.shape, np.uint8)
    fits: dict[int, Any] = {}
    for place, column in enumerate(order):
        group = column // group_size
        own = slice(group * group_size, (group + 1) * group_size)
        if group not in fits:
            fits[group] = grid.fit(moving[:, own].astype(np.float32))
        left = order[place:]
        inverse = np.linalg.inv(gram[np.ix_(left, left)])
        code = grid.nearest(moving[:, [column]].astype(np.float32), fits[group])
        codes[:, column] = code[:, 0]
        error = moving[:, column] - grid.values(code, fits[group])[:, 0]
        moving[:, left] -= np.outer(error / inverse[0, 0], inverse[0])
    return codes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group_size", [7, 16, 200])
def test_gptq_is_what_its_paper_says(kind: str, group_size: int) -> None:
    rng = np.random.default_rng(group_size)
    weight, hessian = a_weight(rng, 12, 150), a_hessian(rng, 150, 400)
    grid = uniform(kind, 3)
    made = gptq(weight, grid, group_size, hessian, order="natural", damping=0.02)
    expected = by_the_inverse(weight, grid, group_size, hessian, np.arange(150), 0.02)
    assert (made.codes == expected).mean() > 0.99


def test_columns_that_never_fire_are_rounded_to_nearest() -> None:
    rng = np.random.default_rng(0)
    weight, hessian = a_weight(rng, 5, 40), a_hessian(rng, 40, 100)
    dead = np.array([0, 7, 39])
    hessian[dead] = 0
    hessian[:, dead] = 0
    for rounding in ("gptq", "comq", "gptq+comq"):
        made = quantize(weight, UniformGrid(), 16, rounding, hessian=hessian)
        scales = made.scales[:, made.group_of_columns()]
        nearest = np.clip(np.rint(weight / scales), -8, 7) * scales
        np.testing.assert_allclose(made.numbers()[:, dead], nearest[:, dead], rtol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_singular_hessians_are_damped_until_they_serve(order: Any) -> None:
    rng = np.random.default_rng(0)
    weight, hessian = a_weight(rng, 20, 64), a_hessian(rng, 64, 3)
    made = gptq(weight, UniformGrid(), 16, hessian, damping=0.0, order=order)
    # Three tokens leave 61 directions free, so nearly all of the error can be made up for.
    assert objective(weight, made, hessian) < 0.2 * objective(
        weight, round_to_nearest(weight, UniformGrid(), 16), hessian
    )


@settings(deadline=None, max_examples=50)
@given(seed=seeds, rows=st.integers(1, 6), columns=st.integers(1, 70), grid=grids, weighed=st.booleans())
def test_a_searched_range_is_never_worse_than_min_and_max(
    seed: int, rows: int, columns: int, grid: UniformGrid, weighed: bool
) -> None:
    rng = np.random.default_rng(seed)
    block = a_weight(rng, rows, columns) + np.float32(rng.choice([0, 3]))
    cares = np.exp(rng.standard_normal(columns)).astype(np.float32) if weighed else None

    def error(search: bool) -> Array:
        which = dataclasses.replace(grid, search=search)
        fit = which.fit(block, cares)
        wrong = (which.values(which.nearest(block, fit), fit).astype(np.float64) - block) ** 2
        return np.asarray(wrong.sum(axis=1) if cares is None else wrong @ cares)

    noise = 1e-10 * (block.astype(np.float64) ** 2).sum(axis=1) * (1 if cares is None else cares.max())
    assert (error(True) <= error(False) * (1 + 1e-4) + noise).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_a_hadamard_matrix_keeps_its_two_numbers(kind: str, bits: int) -> None:
    rotation = hadamard(96)
    rounded = quantize(rotation, dataclasses.replace(uniform(kind, bits, search=True), half=False), 32)
    np.testing.assert_allclose(rounded.dequantized(), rotation, rtol=1e-5)


def test_outliers_are_exact_and_the_rest_has_a_range_of_its_own() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 100)).astype(np.float32)
    weight[2, 5], weight[7, 99] = 40, -30
    made = quantize(weight, uniform("floats"), 100, outliers=2 / 800)
    assert made.outliers is not None
    assert (made.outliers.rows.tolist(), made.outliers.columns.tolist()) == ([2, 7], [5, 99])
    np.testing.assert_allclose(made.numbers()[[2, 7], [5, 99]], [40, -30], rtol=1e-6)
    assert np.abs(made.scales).max() < 0.5
    assert largest(weight, 0).sum() == 0
    assert largest(weight, 0.01).sum() == 8


def bad_hessian(change: str) -> Array:
    hessian = a_hessian(np.random.default_rng(0), 16, 40)
    if change == "nan":
        hessian[3, 4] = np.nan
    elif change == "lopsided":
        hessian[3, 4] += hessian.max()
    elif change == "negative":
        hessian[3, 3] = -1
    else:
        hessian = hessian[:8]
    return hessian


@pytest.mark.parametrize("rounding", ["gptq", "comq", "gptq+comq"])
@pytest.mark.parametrize(
    ("change", "says"),
    [("nan", "finite"), ("lopsided", "symmetric"), ("negative", "negative"), ("shape", "16 columns")],
)
def test_bad_hessians_are_refused(rounding: Any, change: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        quantize(np.ones((4, 16), np.float32), UniformGrid(), 8, rounding, hessian=bad_hessian(change))


class Pairs(UniformGrid):
    width = 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rounding": "gptq"}, "needs a Hessian"),
        ({"rounding": "best"}, "no rounding 'best'"),
        ({"weight": np.full((2, 16), np.inf, np.float32)}, "aren't finite"),
        ({"weight": np.ones((2, 4, 4), np.float32)}, r"must be \[N, K\]"),
        ({"group_size": 0}, "group of 0 columns"),
        ({"importance": np.ones(3, np.float32)}, r"importance of shape \[3\]"),
        ({"outliers": 0.7}, "between 0 and 0.5"),
        ({"rounding": "gptq", "hessian": np.eye(16), "order": "sideways"}, "no order 'sideways'"),
        ({"rounding": "comq", "hessian": np.eye(16), "grid": Pairs()}, "one for 2"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], says: str) -> None:
    given_arguments = {"weight": np.ones((2, 16), np.float32), "grid": UniformGrid(), "group_size": 8} | arguments
    with pytest.raises(ValueError, match=says):
        quantize(**given_arguments)


def test_coordinate_descent_refuses_another_weights_start() -> None:
    weight = np.ones((2, 16), np.float32)
    start: QuantizedWeight = roundings.round_to_nearest(weight, UniformGrid(), 8)
    with pytest.raises(ValueError, match="another grid"):
        coordinate_descent(weight, UniformGrid(), 4, np.eye(16), start)
