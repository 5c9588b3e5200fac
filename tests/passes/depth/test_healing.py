"""Healing: writers behind a removed branch refitted to the original's stream."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from calibration.small_models import parse
from zeroed import outputs, units_of

from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import BatchedDataset
from graphopt.passes.depth.drop_layers import DropLayers

SIZE, INNER = 8, 6


def layers(count: int, *, bias: bool = False, blind: bool = False, seed: int = 0) -> ir.Model:
    """Layers x + tanh(x·A)·B (+ c) in a row; blind: what they write isn't what they read, and A is the same in all."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    lines = ["x0 = Identity(x)"]
    inner = SIZE // 2 if blind else INNER
    for i in range(count):
        a, b = rng.normal(size=(SIZE, inner)) / 2, rng.normal(size=(inner, SIZE)) / 2
        if blind:
            a = weights.get("a0", a)
            a[SIZE // 2 :], b[:, : SIZE // 2] = 0, 0
        weights |= {f"a{i}": a.astype(np.float32), f"b{i}": b.astype(np.float32)}
        lines += [f"u{i} = MatMul(x{i}, a{i})", f"t{i} = Tanh(u{i})", f"d{i} = MatMul(t{i}, b{i})"]
        if bias:
            weights[f"c{i}"] = rng.normal(size=SIZE).astype(np.float32)
            lines.append(f"e{i} = Add(d{i}, c{i})")
        lines.append(f"x{i + 1} = Add(x{i}, {'e' if bias else 'd'}{i})")
    text = "\n".join([*lines, f"y = Identity(x{count})"])
    return parse(f"g (float[b, t, {SIZE}] x) => (float[b, t, {SIZE}] y) {{\n{text}\n}}", weights)


def normed(count: int, seed: int = 0) -> ir.Model:
    """Layers LN(x + tanh(x·A)·B) in a row (post-LN), each norm with a scale and a shift."""
    rng = np.random.default_rng(seed)
    weights: dict[str, np.ndarray] = {}
    lines = ["x0 = Identity(x)"]
    for i in range(count):
        weights |= {f"a{i}": rng.normal(size=(SIZE, INNER)) / 2, f"b{i}": rng.normal(size=(INNER, SIZE))}
        weights |= {f"s{i}": rng.uniform(0.5, 2, SIZE), f"c{i}": rng.normal(size=SIZE)}
        lines += [f"u{i} = MatMul(x{i}, a{i})", f"t{i} = Tanh(u{i})", f"d{i} = MatMul(t{i}, b{i})"]
        lines += [f"z{i} = Add(x{i}, d{i})", f"x{i + 1} = LayerNormalization <axis = -1> (z{i}, s{i}, c{i})"]
    text = "\n".join([*lines, f"y = Identity(x{count})"])
    constants = {name: array.astype(np.float32) for name, array in weights.items()}
    return parse(f"g (float[b, t, {SIZE}] x) => (float[b, t, {SIZE}] y) {{\n{text}\n}}", constants)


def given(seed: int, rows: int = 40) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(rows, 5, SIZE)).astype(np.float32)}


def dropped(model: ir.Model, **options: Any) -> tuple[ir.Model, DropLayers]:
    copy = model.clone()
    step = DropLayers(**options)
    step.calibration = Calibration(BatchedDataset(given(1), batch=8), threads=1)
    step(copy)
    return copy, step


def error(model: ir.Model, other: ir.Model) -> float:
    """The mean over tokens of |y − y'|² / |y|² on other inputs than the calibration's."""
    y, z = (outputs(one, given(2))["y"].astype(np.float64) for one in (model, other))
    return float((np.square(y - z).sum(-1) / np.square(y).sum(-1)).mean())


@pytest.mark.parametrize("bias", [False, True])
def test_what_the_next_layer_shows_is_made_up_for_exactly(bias: bool) -> None:
    model = layers(3, bias=bias, blind=True)
    if bias:  # what the layers read must not be moved by what they write
        for i in range(3):
            held = model.graph.initializers[f"c{i}"]
            assert held.const_value is not None
            moved = held.const_value.numpy().copy()
            moved[: SIZE // 2] = 0
            held.const_value = ir.tensor(moved, name=held.name)
    healed, step = dropped(model, branches=["mlp.1"], heal="linear", ridge=1e-9)
    assert error(model, healed) < 1e-8
    assert ["mlp.0 refitted" in site.detail for site in step.sites] == [False, True]
    assert len(units_of(healed).units) == 2
    # Nothing was added to the graph, and no weight is left over.
    assert len(healed.graph) == len(dropped(model, branches=["mlp.1"])[0].graph)
    assert all(value.uses() for value in healed.graph.initializers.values())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("form", ["affine", "linear"])
def test_healing_gives_something_back_on_other_inputs(form: str, bias: bool) -> None:
    model = layers(5, bias=bias, seed=3)
    plain, _ = dropped(model, branches=["mlp.1"])
    healed, _ = dropped(model, branches=["mlp.1"], heal=form)
    # Without a bias a factor alone makes up for little.
    assert error(model, healed) < error(model, plain) * (0.95 if form == "affine" and not bias else 0.7)


def test_a_linear_map_gives_back_more_than_factors() -> None:
    model = layers(5, seed=4)
    affine, linear = (dropped(model, branches=["mlp.2"], heal=form)[0] for form in ("affine", "linear"))
    assert error(model, linear) < error(model, affine)


def test_a_strong_ridge_keeps_the_weights() -> None:
    model = layers(3, bias=True)
    plain, _ = dropped(model, branches=["mlp.0"])
    held, _ = dropped(model, branches=["mlp.0"], heal="linear", ridge=1e9)
    assert error(plain, held) < 1e-6


def test_the_one_before_a_run_is_refitted_to_what_stood_behind_it() -> None:
    model = layers(6, seed=2)
    plain, _ = dropped(model, branches=["mlp.2", "mlp.3", "mlp.5"])
    healed, step = dropped(model, branches=["mlp.2", "mlp.3", "mlp.5"], heal="linear")
    assert [s.detail.split(" refitted")[0] for s in step.sites if "refitted" in s.detail] == ["mlp.1", "mlp.4"]
    assert error(model, healed) < 0.9 * error(model, plain)


def test_the_first_has_one_behind_it_refitted() -> None:
    model = layers(3, seed=2)
    plain, _ = dropped(model, branches=["mlp.0"])
    healed, step = dropped(model, branches=["mlp.0"], heal="linear")
    assert [s.detail.split(" refitted")[0] for s in step.sites if "refitted" in s.detail] == ["mlp.1"]
    assert error(model, healed) < error(model, plain)


@pytest.mark.parametrize(
    ("form", "removed", "refitted"),
    [
        ("affine", ["mlp.3"], ["the norm behind mlp.3"]),
        ("linear", ["mlp.3"], ["the norm behind mlp.3"]),
        ("affine", ["mlp.1"], ["the norm behind mlp.1", "mlp.2"]),
        ("linear", ["mlp.1"], ["mlp.2"]),
        ("affine", ["mlp.1", "mlp.2"], ["the norm behind mlp.2", "mlp.3"]),
    ],
)
def test_behind_a_sum_that_is_normalized_the_norm_is_refitted_too(
    form: str, removed: list[str], refitted: list[str]
) -> None:
    model = normed(4)
    plain, _ = dropped(model, branches=removed)
    healed, step = dropped(model, branches=removed, heal=form)
    assert [s.detail.split(" refitted")[0] for s in step.sites if "refitted" in s.detail] == refitted
    assert error(model, healed) < 0.9 * error(model, plain)
    assert len(healed.graph) == len(plain.graph)
    assert all(value.uses() for value in healed.graph.initializers.values())


def test_a_norm_that_gives_what_it_gave_keeps_its_scale() -> None:
    model = normed(2)
    held = model.graph.initializers["b1"]
    held.const_value = ir.tensor(np.zeros((INNER, SIZE), np.float32), name=held.name)
    healed, _ = dropped(model, branches=["mlp.1"], heal="affine")
    assert error(model, healed) < 1e-10


def test_a_norm_that_goes_with_its_branch_isnt_refitted() -> None:
    _, step = dropped(normed(3), branches=["mlp.1"], heal="affine", norms="remove")
    assert [s.detail.split(" refitted")[0] for s in step.sites if "refitted" in s.detail] == ["mlp.2"]


def test_what_has_no_linear_layer_last_is_left() -> None:
    model = parse(
        f"""g (float[b, t, {SIZE}] x) => (float[b, t, {SIZE}] y) {{
            u0 = MatMul(x, a)
            d0 = Tanh(u0)
            x1 = Add(x, d0)
            u1 = MatMul(x1, a)
            y = Add(x1, u1)
        }}""",
        {"a": np.eye(SIZE, dtype=np.float32)},
    )
    _, step = dropped(model, branches=["mlp.1"], heal="linear")
    assert [site.outcome for site in step.sites] == ["applied", "left"]
    assert "no linear layer" in step.sites[1].detail
