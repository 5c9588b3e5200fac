"""Merging without torch or peft: what is read when, blocks, types, sums, and a sentence for each bad input."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import ModelError, UsageError
from graphopt.export.adapters import AdaptedWeights, Adapter, merge
from graphopt.export.adapters.formulas import METHODS

safetensors_numpy = pytest.importorskip("safetensors.numpy")

RNG = np.random.default_rng(0)
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "down"]}


class Base:
    """Weights in memory that count how often each is read."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        self.arrays = arrays
        self.reads: list[str] = []

    def names(self) -> Collection[str]:
        return self.arrays.keys()

    def tensor(self, name: str) -> ir.TensorProtocol:
        array = self.arrays[name]
        tensor = ir.Tensor(array, dtype=ir.DataType.from_numpy(array.dtype), name=name)

        def read() -> ir.TensorProtocol:
            self.reads.append(name)
            return tensor

        return ir.LazyTensor(read, dtype=tensor.dtype, shape=ir.Shape(array.shape), name=name)


def random(*shape: int, dtype: Any = np.float32) -> Any:
    return RNG.normal(size=shape).astype(dtype)


def base(dtype: Any = np.float32) -> Base:
    return Base({f"layers.{i}.{n}.weight": random(*s, dtype=dtype) for i in range(2) for n, s in SHAPES.items()})


SHAPES = {"q": (6, 8), "down": (8, 10), "other": (3, 8)}


def write(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **config}))
    safetensors_numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def lora_tensors(rank: int = 2, prefix: str = "base_model.model.") -> dict[str, Any]:
    found = {}
    for i in range(2):
        for name in ("q", "down"):
            out, into = SHAPES[name]
            found[f"{prefix}layers.{i}.{name}.lora_A.weight"] = random(rank, into)
            found[f"{prefix}layers.{i}.{name}.lora_B.weight"] = random(out, rank)
    return found


def delta(tensors: dict[str, Any], module: str, scale: float = 2.0) -> Any:
    a, b = (tensors[f"base_model.model.{module}.lora_{n}.weight"] for n in "AB")
    return scale * (b @ a)


def test_a_weight_is_read_when_it_is_asked_for(tmp_path: Path) -> None:
    weights = base()
    tensors = lora_tensors()
    adapted = AdaptedWeights(weights, write(tmp_path, tensors))
    assert list(adapted.names()) == list(weights.names())
    assert set(adapted.changed()) == {f"layers.{i}.{n}.weight" for i in range(2) for n in ("q", "down")}
    tensor = adapted.tensor("layers.0.q.weight")
    assert (tuple(tensor.shape), tensor.dtype, tensor.name) == ((6, 8), ir.DataType.FLOAT, "layers.0.q.weight")
    assert weights.reads == []
    expected = weights.arrays["layers.0.q.weight"] + delta(tensors, "layers.0.q")
    np.testing.assert_allclose(tensor.numpy(), expected, atol=1e-6)
    assert weights.reads == ["layers.0.q.weight"]
    np.testing.assert_array_equal(tensor.numpy(), adapted.tensor("layers.0.q.weight").numpy())
    np.testing.assert_array_equal(
        adapted.tensor("layers.1.other.weight").numpy(), weights.arrays["layers.1.other.weight"]
    )


@settings(max_examples=25, deadline=None)
@given(
    out=st.integers(1, 9), into=st.integers(1, 9), rank=st.integers(1, 4), block=st.integers(1, 200),
    dora=st.booleans(), turned=st.booleans(),
)  # fmt: skip
def test_blocks_give_the_formula(
    tmp_path_factory: pytest.TempPathFactory, out: int, into: int, rank: int, block: int, dora: bool, turned: bool
) -> None:
    """The weight is merged in blocks of its rows as they are stored; any size of block gives W' = W + (alpha/r) B A."""
    weight, a, b, m = random(out, into), random(rank, into), random(out, rank), random(out)
    stem = "base_model.model.q."
    tensors = {f"{stem}lora_A.weight": a, f"{stem}lora_B.weight": b}
    if dora:
        tensors[f"{stem}lora_magnitude_vector"] = m
    config = {"use_dora": dora, "fan_in_fan_out": turned, "target_modules": ["q"]}
    folder = write(tmp_path_factory.mktemp("adapter"), tensors, **config)
    stored = np.ascontiguousarray(weight.T) if turned else weight
    expected = weight.astype(np.float64) + 4 / rank * b.astype(np.float64) @ a
    if dora:
        expected *= (m / np.linalg.norm(expected, axis=1))[:, None]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge, "BLOCK_BYTES", block)
        adapted = AdaptedWeights(Base({"q.weight": stored}), folder, turned=["q.weight"] if turned else [])
        found = adapted.tensor("q.weight").numpy()
    np.testing.assert_allclose(found.T if turned else found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_the_type_is_the_base_s(tmp_path: Path, dtype: Any) -> None:
    weights = base(dtype)
    tensors = lora_tensors()
    found = AdaptedWeights(weights, write(tmp_path, tensors)).tensor("layers.1.down.weight")
    assert found.dtype == ir.DataType.from_numpy(np.dtype(dtype))
    exact = weights.arrays["layers.1.down.weight"].astype(np.float32) + delta(tensors, "layers.1.down")
    np.testing.assert_allclose(found.numpy().astype(np.float32), exact.astype(dtype).astype(np.float32), rtol=1e-2)


def test_a_weighted_sum(tmp_path: Path) -> None:
    one, two = lora_tensors(), lora_tensors(rank=4)
    weights = base()
    given_ones = [(write(tmp_path / "one", one), 0.25), (write(tmp_path / "two", two), -2.0)]
    found = AdaptedWeights(weights, given_ones).tensor("layers.0.q.weight").numpy()
    expected = weights.arrays["layers.0.q.weight"] + 0.25 * delta(one, "layers.0.q") - 2 * delta(two, "layers.0.q", 1.0)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    alone = AdaptedWeights(weights, given_ones[0]).tensor("layers.0.q.weight").numpy()
    np.testing.assert_allclose(alone, weights.arrays["layers.0.q.weight"] + 0.25 * delta(one, "layers.0.q"), atol=1e-5)


def test_a_sum_is_rounded_once(tmp_path: Path) -> None:
    """Of a low-rank and a sparse change of a float16 weight."""
    weights = base(np.float16)
    one = lora_tensors()
    stem = "base_model.model.layers.0.q.shira_"
    two = {f"{stem}weight": random(3), f"{stem}indices": np.array([[0, 1, 5], [7, 2, 3]], np.int32)}
    folders = [
        write(tmp_path / "one", one),
        write(tmp_path / "two", two, peft_type="SHIRA", target_modules=["q"]),
    ]
    found = AdaptedWeights(weights, folders).tensor("layers.0.q.weight").numpy()
    exact = weights.arrays["layers.0.q.weight"].astype(np.float32) + delta(one, "layers.0.q")
    np.add.at(exact, tuple(two[f"{stem}indices"]), two[f"{stem}weight"])
    assert np.all(np.abs(found.astype(np.float32) - exact) <= 0.501 * np.spacing(np.abs(found)).astype(np.float32))


def test_a_new_classifier(tmp_path: Path) -> None:
    tensors = {**lora_tensors(), "base_model.model.score.weight": random(2, 8)}
    adapted = AdaptedWeights(base(), write(tmp_path, tensors, modules_to_save=["score"]))
    assert "score.weight" in adapted.names()
    found = adapted.tensor("score.weight")
    assert tuple(found.shape) == (2, 8)
    np.testing.assert_array_equal(found.numpy(), tensors["base_model.model.score.weight"])


def test_bone_is_what_miss_was_called(tmp_path: Path) -> None:
    block = random(4, 6)
    tensors = {"base_model.model.layers.0.q.bone_block": block}
    weights = base()
    adapted = AdaptedWeights(weights, write(tmp_path, tensors, peft_type="BONE", target_modules=["q"]))
    expected = weights.arrays["layers.0.q.weight"] + np.concatenate([block, block]).T
    np.testing.assert_allclose(adapted.tensor("layers.0.q.weight").numpy(), expected, atol=1e-6)


def test_an_entry_that_no_module_has_is_told(tmp_path: Path) -> None:
    adapted = AdaptedWeights(base(), write(tmp_path, lora_tensors(), target_modules=["q", "down", "query"]))
    assert adapted.notes == [f"{tmp_path}: the target module 'query' of its adapter_config.json matches no module"]


def read_all(weights: Base, folder: Path) -> None:
    adapted = AdaptedWeights(weights, folder)
    for name in adapted.names():
        adapted.tensor(name).numpy()


@pytest.mark.parametrize(
    ("named", "base_named"),
    [("", "model."), ("model.", ""), ("language_model.model.", "model.language_model."), ("a.", "b.c.")],
)
def test_names_that_differ_in_front(tmp_path: Path, named: str, base_named: str) -> None:
    """An adapter of a body in a whole model, and the other way round, and of a model whose parts are called otherwise."""
    tensors = lora_tensors()
    plain = base()
    weights = Base({f"{base_named}{n}": v for n, v in plain.arrays.items()})
    weights.arrays["vision.layers.0.q.weight"] = random(5, 5)
    renamed = {k.replace("base_model.model.", f"base_model.model.{named}"): v for k, v in tensors.items()}
    adapted = AdaptedWeights(weights, write(tmp_path, renamed))
    for module in ("layers.0.q", "layers.1.down"):
        found = adapted.tensor(f"{base_named}{module}.weight").numpy()
        expected = plain.arrays[f"{module}.weight"] + delta(tensors, module)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    assert "vision.layers.0.q.weight" not in adapted.changed()


class TestBadInput:
    def fails(
        self, folder: Path, message: str, kind: type[Exception] = UsageError, weights: Base | None = None
    ) -> None:
        with pytest.raises(kind, match=message) as caught:
            read_all(weights or base(), folder)
        assert "\n" not in str(caught.value)

    def test_no_folder(self, tmp_path: Path) -> None:
        self.fails(tmp_path / "none", "there is no folder .*none with an adapter")

    def test_no_configuration(self, tmp_path: Path) -> None:
        self.fails(tmp_path, "is no adapter: it has no adapter_config.json")

    @pytest.mark.parametrize(("text", "message"), [("{", "can't be read"), ("[]", "peft_type"), ("{}", "peft_type")])
    def test_broken_configuration(self, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "adapter_config.json").write_text(text)
        self.fails(tmp_path, message, ModelError)

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("PREFIX_TUNING", "adds learned inputs and changes no weight, so it can't be merged"),
            ("P_TUNING", "adds learned inputs"),
            ("XLORA", "whose change of a weight depends on the input"),
            ("NEWEST", "is a NEWEST adapter, which isn't one of ADALORA, BEFT"),
        ],
    )
    def test_a_method_that_does_not_merge(self, tmp_path: Path, kind: str, message: str) -> None:
        self.fails(write(tmp_path, lora_tensors(), peft_type=kind), message)

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"use_qalora": True}, "use_qalora"),
            ({"layer_replication": [[0, 1], [0, 1]]}, "repeats layers of its base"),
            ({"peft_type": "LOHA", "target_parameters": ["experts.w"]}, "target_parameters"),
            ({"init_lora_weights": "corda"}, "changed base .*path_initial_model_for_weight_conversion"),
            ({"init_lora_weights": "pissa_niter_4"}, "changed base"),
            ({"init_lora_weights": "pissa", "use_dora": True}, "DoRA together with init_lora_weights 'pissa'"),
        ],
    )
    def test_a_setting_that_does_not_merge(self, tmp_path: Path, setting: dict[str, Any], message: str) -> None:
        self.fails(write(tmp_path, lora_tensors(), **setting), message)

    def test_only_a_pickle(self, tmp_path: Path) -> None:
        write(tmp_path, lora_tensors())
        (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
        self.fails(
            tmp_path, r"has no adapter_model.safetensors \(it has adapter_model.bin, .*safe_serialization=True\)"
        )
        (tmp_path / "adapter_model.bin").unlink()
        self.fails(tmp_path, "has no adapter_model.safetensors$")

    @pytest.mark.parametrize("kept", [0, 5, 60, -3])
    def test_truncated(self, tmp_path: Path, kept: int) -> None:
        path = write(tmp_path, lora_tensors()) / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:kept])
        self.fails(tmp_path, "adapter_model.safetensors is truncated or no safetensors file", ModelError)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_a_number(self, tmp_path: Path, value: float) -> None:
        tensors = lora_tensors()
        tensors["base_model.model.layers.1.q.lora_B.weight"][3, 1] = value
        self.fails(write(tmp_path, tensors), r"layers.1.q.lora_B.weight has values that are NaN", ModelError)

    def test_nothing_of_the_method(self, tmp_path: Path) -> None:
        self.fails(write(tmp_path, {}), "holds no tensor of a LORA adapter")

    def test_another_base_by_name(self, tmp_path: Path) -> None:
        tensors = {k.replace(".down.", ".fc2."): v for k, v in lora_tensors().items()}
        self.fails(
            write(tmp_path, tensors),
            r"is of another base: it has base_model.model.layers.0.fc2.lora_A.weight, and the base has no parameter "
            r"layers.0.fc2.weight",
        )

    def test_another_base_by_shape(self, tmp_path: Path) -> None:
        weights = base()
        weights.arrays["layers.1.down.weight"] = random(8, 12)
        self.fails(
            write(tmp_path, lora_tensors()),
            r"is of another base: base_model.model.layers.1.down.lora_A.weight fits a weight of 8 × 10 features, and "
            r"the base's layers.1.down.weight is 8×12",
            weights=weights,
        )

    def test_a_quantized_base(self, tmp_path: Path) -> None:
        weights = base()
        weights.arrays["layers.0.q.weight"] = np.ones((6, 8), np.int8)
        self.fails(
            write(tmp_path, lora_tensors()),
            r"layers.0.q.weight is stored as INT8.*dequantize the base",
            weights=weights,
        )

    def test_half_a_fit(self, tmp_path: Path) -> None:
        """Only the inputs are known of this method, and they are as many as the base's outputs."""
        tensors = {"base_model.model.layers.0.q.hra_u": random(6, 2)}
        self.fails(
            write(tmp_path, tensors, peft_type="HRA", target_modules=["q"]),
            "fits a weight of any × 6 features, and the base's layers.0.q.weight is 6×8",
        )

    def test_a_vector_where_a_matrix_is_due(self, tmp_path: Path) -> None:
        weights = base()
        weights.arrays["layers.1.down.weight"] = random(8)
        self.fails(
            write(tmp_path, lora_tensors()), "the base's layers.1.down.weight is 8, not a matrix", weights=weights
        )

    def test_a_saved_module_of_another_size(self, tmp_path: Path) -> None:
        tensors = {**lora_tensors(), "base_model.model.layers.0.other.weight": random(5, 8)}
        self.fails(
            write(tmp_path, tensors, modules_to_save=["other"]),
            r"layers.0.other.weight is 5×8, where the base's layers.0.other.weight is 3×8",
        )

    def test_a_parameter_of_nothing(self, tmp_path: Path) -> None:
        tensors = {**lora_tensors(), "base_model.model.layers.0.gate.weight": random(5, 8)}
        self.fails(write(tmp_path, tensors), "and the base has no parameter layers.0.gate.weight")

    def test_a_target_without_tensors(self, tmp_path: Path) -> None:
        tensors = {k: v for k, v in lora_tensors().items() if ".q." not in k}
        self.fails(write(tmp_path, tensors), "has nothing for the target module 'q' of its adapter_config.json")

    def test_half_of_a_pair(self, tmp_path: Path) -> None:
        tensors = lora_tensors()
        del tensors["base_model.model.layers.1.q.lora_B.weight"]
        self.fails(write(tmp_path, tensors), "lacks tensors for layers.1.q: it has lora_A")

    def test_ranks_that_differ(self, tmp_path: Path) -> None:
        tensors = lora_tensors()
        tensors["base_model.model.layers.1.q.lora_B.weight"] = random(6, 3)
        self.fails(
            write(tmp_path, tensors), r"the tensors of layers.1.q don't fit each other .*: the product is .* 6×3"
        )

    def test_places_outside_of_the_weight(self, tmp_path: Path) -> None:
        stem = "base_model.model.layers.0.q.shira_"
        places = np.array([[0, 6], [0, 0]], np.int32)
        tensors = {f"{stem}weight": random(2), f"{stem}indices": places}
        self.fails(write(tmp_path, tensors, peft_type="SHIRA", target_modules=["q"]), "don't fit each other")

    def test_a_setting_that_lacks(self, tmp_path: Path) -> None:
        path = write(tmp_path, lora_tensors()) / "adapter_config.json"
        path.write_text(json.dumps({"peft_type": "LORA"}))
        self.fails(tmp_path, "adapter_config.json lacks lora_alpha")

    def test_a_bias_for_none(self, tmp_path: Path) -> None:
        tensors = {**lora_tensors(), "base_model.model.layers.0.q.lora_B.bias": random(6)}
        self.fails(write(tmp_path, tensors, lora_bias=True), "adds a bias to layers.0.q .*the base has none")

    def test_too_many_tokens(self, tmp_path: Path) -> None:
        tensors = {"base_model.model.layers.0.other.trainable_tokens_delta": random(2, 8)}
        config = {"peft_type": "TRAINABLE_TOKENS", "target_modules": ["other"]}
        self.fails(write(tmp_path, tensors, **config, token_indices=[1, 3]), "2×8 for 2 tokens, where the base's")

    def test_shared_matrices_that_were_not_saved(self, tmp_path: Path) -> None:
        stem = "base_model.model.layers.0.q.pvera_lambda_"
        tensors = {f"{stem}b": random(6), f"{stem}d": random(4)}
        self.fails(
            write(tmp_path, tensors, peft_type="PVERA", target_modules=["q"]), "has no pvera_A.*save_projection=True"
        )

    def test_several_that_do_not_sum(self, tmp_path: Path) -> None:
        plain = write(tmp_path / "plain", lora_tensors())
        turning = {"base_model.model.layers.0.q.hra_u": random(8, 2)}
        other = write(tmp_path / "hra", turning, peft_type="HRA", target_modules=["q"])
        with pytest.raises(UsageError, match=r"hra changes layers.0.q.weight by more than adding to it"):
            AdaptedWeights(base(), [plain, other])
        with pytest.raises(UsageError, match=r"can only be merged alone and with weight 1"):
            AdaptedWeights(base(), (other, 0.5))
        saved = {**lora_tensors(), "base_model.model.layers.0.other.weight": random(3, 8)}
        first, second = (write(tmp_path / n, saved, modules_to_save=["other"]) for n in ("first", "second"))
        with pytest.raises(UsageError, match=r"both replace layers.0.other.weight; merge one of them"):
            AdaptedWeights(base(), [first, second])
        with pytest.raises(UsageError, match=r"can't be merged with weight 2"):
            AdaptedWeights(base(), (first, 2))


def test_every_method_is_one_of_three_kinds() -> None:
    for name, method in METHODS.items():
        kinds = [k for k in (method.factors, method.delta, method.transform) if k is not None]
        assert len(kinds) == 1 or (not kinds and (method.bias or name in ("LN_TUNING", "TRAINABLE_TOKENS"))), name


def test_an_adapter_tells_what_it_changes(tmp_path: Path) -> None:
    adapter = Adapter(write(tmp_path, lora_tensors()))
    assert set(adapter.modules) == {f"layers.{i}.{n}" for i in range(2) for n in ("q", "down")}
    assert adapter.replaced == {}
