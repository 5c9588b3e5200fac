"""Times of products: chains compute what they stand for, and what was measured is found again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.graph.edits import nodes
from graphopt.passes.quantize import product_times
from graphopt.passes.quantize.packing import Packer, Unpackable
from graphopt.passes.quantize.product_times import Product, chain, product_seconds
from graphopt.passes.quantize.setting import Setting
from graphopt.runtime_ops.memory_session import make_session

CHAINS = [
    (Product(64, 96), {"MatMul": 3}),
    (Product(64, 96, Setting(bits=4, group_size=32, symmetric=False)), {"MatMulNBits": 3}),
    (Product(64, 96, Setting(bits=4, group_size=32), level="int8x2"), {"MatMulNBits": 6}),
    (Product(64, 96, Setting(bits=8, group_size=64)), {"MatMulNBits": 3}),
    (Product(64, 96, Setting(bits=3, group_size=32)), {"CodebookMatMul": 3}),
    (Product(64, 20, Setting(bits=2, grid="higgs")), {"CodebookMatMul": 3, "HadamardTransform": 3}),
]


@pytest.mark.parametrize(("product", "expected"), CHAINS)
def test_a_chain_has_products_of_its_own(product: Product, expected: dict[str, int]) -> None:
    model = chain(product, 3)
    found = Counter(node.op_type for node in nodes(model))
    assert {name: found[name] for name in expected} == expected
    session = make_session(model, threads=1)
    feeds = {one.name: np.ones((1, 1, 64), np.float32) for one in session.get_inputs()}
    assert len(feeds) == 3
    (y,) = session.run(None, feeds)
    assert y.shape == (1, 1, product.outputs)
    assert np.isfinite(y).all()
    # Equal weights could be made one.
    arrays = [value.const_value.tobytes() for value in model.graph.initializers.values() if value.const_value]
    assert max(Counter(array for array in arrays if len(array) > 300).values()) == 1


def test_what_no_operator_carries_is_a_float_product(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise Unpackable("no operator has such numbers")

    monkeypatch.setattr(Packer, "product", refused)
    found = Counter(node.op_type for node in nodes(chain(Product(64, 8, Setting(bits=4, group_size=32)), 2)))
    assert found["MatMul"] == 2


def test_nothing_to_time_takes_none() -> None:
    assert product_seconds({}) == {}


def test_products_are_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(product_times, "MAX_ROUNDS", 3)
    measured = product_times._measured
    asked: list[Any] = []

    def counted(kinds: Any, threads: int | None) -> list[float]:
        asked.append([(one.inputs, length) for one, length in kinds])
        return measured(kinds, threads)

    monkeypatch.setattr(product_times, "_measured", counted)
    products = {Product(64, 64): 2, Product(64, 64, Setting()): 2, Product(1024, 8192): 40}
    first = product_seconds(products, 1, tmp_path)
    assert asked == [[(64, 2), (64, 2), (1024, 2)]]
    assert all(seconds > 0 for seconds in first.values())
    assert product_seconds(products, 1, tmp_path) == first
    assert len(asked) == 1
    # Of another sitting, they can't be compared.
    product_seconds(dict(list(products.items())[:2]), 1, tmp_path)
    product_seconds(products, 2, tmp_path)
    assert len(asked) == 3
