"""How long products of one token with quantized weights take in ONNX Runtime on this machine, by measurement."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.interleaved import NO_SPINNING, Interleaved
from graphopt.analysis.profile_cache import this_machine
from graphopt.calibration.cache import TrialCache
from graphopt.graph.edits import Editor
from graphopt.passes.quantize.packing import Packer, Unpackable
from graphopt.passes.quantize.setting import Setting
from graphopt.runtime_ops.block_products import Inputs
from graphopt.runtime_ops.library import library_path
from graphopt.runtime_ops.memory_session import make_session

Array = npt.NDArray[Any]
OPSET = 21
LONGEST, LARGEST_BYTES = 32, 64 << 20
"""Products of a chain at most, and bytes of its float weights unless a single one has more."""
WARMUP, MIN_ROUNDS, MAX_ROUNDS, MOST_SECONDS = 2, 15, 60, 20.0
"""Rounds of all chains: those that don't count, those that do, and how long they may take beyond the fewest."""
_ROWS = 32
"""Rows of a weight that are rounded; the others repeat them, which no operator's time hangs on."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A product [1, 1, K] · [K, N] of one token.

    Attributes:
        inputs: K.
        outputs: N.
        setting: How the weight is quantized; None: it is float.
        level: What `MatMulNBits` makes of what it reads, where it is the one.
        dtype: Of what is read, and of float weights.
    """

    inputs: int
    outputs: int
    setting: Setting | None = None
    level: Inputs = "int8"
    dtype: ir.DataType = ir.DataType.FLOAT

    @property
    def shape(self) -> tuple[int, int]:
        """(K, N)."""
        return self.inputs, self.outputs


def product_seconds(
    products: Mapping[Product, int], threads: int | None = None, cache: Path | None = None
) -> dict[Product, float]:
    """Seconds of wall-clock time of each of some products.

    Each stands in a chain with others of its kind, all with weights and inputs of their own, as many as the model has
    of that shape (`LONGEST` and `LARGEST_BYTES` at most), and every round runs all chains once, in an order that
    changes. So between two runs of a chain all others' weights are read, more bytes than a model has that holds one
    weight of each place: what doesn't stay in the processor's caches from token to token doesn't stay here either.

    Args:
        products: What is timed, and how often the model has a product of that shape.
        threads: Threads within an operator; None leaves it to ONNX Runtime.
        cache: A folder in which times are kept, and found again on the same machine with the same runtime. They are
            found only where all of them were measured together, with the same library of kernels: those of another
            hour can't be compared.
    """
    kinds = list(products)
    if not kinds:
        return {}
    key = repr((OPSET, LONGEST, LARGEST_BYTES, threads, [(one, products[one]) for one in kinds]))
    library = library_path()
    built = "" if library is None else f"{library.stat().st_size} {library.stat().st_mtime_ns}"
    kept = TrialCache(cache, None, "products", *map(str, this_machine()), built, key)
    known = kept.load("seconds")
    if known is None:
        known = np.array(_measured([(one, _length(one, products[one])) for one in kinds], threads))
        kept.save("seconds", known)
    return dict(zip(kinds, known.tolist(), strict=True))


def chain(product: Product, length: int) -> ir.Model:
    """A model of products of one kind, each with an input [1, 1, K] of its own, and the sum of all as output."""
    shape = ir.Shape([1, 1, product.inputs])
    made = ir.TensorType(product.dtype)
    sources = [ir.Value(name=f"x_{i}", type=made, shape=shape) for i in range(length)]
    terms = [ir.Value(name=f"term_{i}", type=made, shape=ir.Shape([1, 1, product.outputs])) for i in range(length)]
    # What the editor writes goes before these.
    sites = [
        ir.node("Identity", [x], outputs=[y], name=f"site_{i}")
        for i, (x, y) in enumerate(zip(sources, terms, strict=True))
    ]
    total = ir.node("Sum", terms, outputs=[ir.Value(name="y", type=made, shape=terms[0].shape)], name="sum")
    graph = ir.Graph(
        sources, total.outputs, nodes=[*sites, total], opset_imports={"": OPSET, "com.microsoft": 1}, name="products"
    )
    model = ir.Model(graph, ir_version=10)
    edit = Editor(model)
    packer = Packer(edit, "contrib")
    some = np.random.default_rng(0).standard_normal((min(_ROWS, product.outputs), product.inputs)).astype(np.float32)
    rounded = None if product.setting is None else nearest(product.setting).round(some).weight
    for number, (site, x) in enumerate(zip(sites, sources, strict=True)):
        edit.at(site)
        # Rolled, so that no two weights are the same.
        index = np.roll(np.resize(np.arange(len(some)), product.outputs), number)
        y: ir.Value | None = None
        if rounded is not None:
            names = ("codes", "scales", "zero_points", "offsets", "selectors")
            arrays = {name: getattr(rounded, name) for name in names}
            rows = {name: array[index] for name, array in arrays.items() if array is not None}
            # What no operator carries stays in floats, and takes their time.
            with contextlib.suppress(Unpackable):
                y = packer.product(x, dataclasses.replace(rounded, **rows), f"weight_{number}", product.level)
        if y is None:
            y = edit.op("MatMul", [x, edit.constant(some[index].T.astype(product.dtype.numpy()), "weight")])
        edit.replace(site.outputs[0], y)
    return model


def nearest(setting: Setting) -> Setting:
    """A setting without what needs data, and without a branch of low rank."""
    return setting.with_options({"rounding": "nearest", "weighed": False, "compensation": "none"})


def _length(product: Product, count: int) -> int:
    return max(1, min(count, LONGEST, LARGEST_BYTES // (4 * product.inputs * product.outputs)))


def _measured(kinds: Sequence[tuple[Product, int]], threads: int | None) -> list[float]:
    """Seconds of one product of each kind, the median over rounds in which the chains of all kinds ran in turn."""
    runs = []
    for product, length in kinds:
        session = make_session(chain(product, length), threads=threads, settings=NO_SPINNING)
        rng = np.random.default_rng(0)
        feeds = {
            one.name: rng.standard_normal((1, 1, product.inputs)).astype(product.dtype.numpy())
            for one in session.get_inputs()
        }
        runs.append(functools.partial(session.run, None, feeds))
    timed = Interleaved(runs)
    for _ in range(WARMUP):
        timed.round(keep=False)
    begin = time.perf_counter()
    while len(timed.wall[0]) < MAX_ROUNDS:
        if len(timed.wall[0]) >= MIN_ROUNDS and time.perf_counter() - begin > MOST_SECONDS:
            break
        timed.round()
    return [statistics.median(series) / length for series, (_, length) in zip(timed.wall, kinds, strict=True)]
