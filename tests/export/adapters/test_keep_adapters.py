"""Adapters kept beside the weights: one session is the base and each adapter in turn, as torch with peft has them."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from adapter_cases import bert, gpt2, save_adapter

from graphopt.errors import ModelError, UsageError
from graphopt.export.adapters.separate import KeptAdapter, keep_adapters
from graphopt.graph.load import load
from graphopt.graph.save import save

ort = pytest.importorskip("onnxruntime")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

RNG = np.random.default_rng(0)


def session(path: Path) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3  # ONNX Runtime warns of every initializer that can be overridden.
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def switched(kept: KeptAdapter, folder: Path) -> Any:
    """Run options with the adapter in force, by way of its file, and the adapter, which must live as long."""
    adapter = ort.LoraAdapter()
    adapter.Load(str(kept.write(folder / f"{kept.name}.onnx_adapter")))
    options = ort.RunOptions()
    options.add_active_adapter(adapter)
    return options, adapter


# ---- graphs written down, without torch


def graph(dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Model:
    """x [b, 4] through a [out, in] weight turned over, a [in, out] weight, a Gemm and a table of tokens."""
    name = {ir.DataType.FLOAT: "float", ir.DataType.FLOAT16: "float16"}[dtype]
    model = ir.from_onnx_text(f"""
        <ir_version: 10, opset_import: ["" : 21]>
        agraph ({name}[b, 4] x, int64[b] ids) => ({name}[b, 3] y, {name}[b, 5] z, {name}[b, 6] w, {name}[b, 4] e) {{
            turned = Transpose<perm=[1, 0]>("a.weight")
            y = MatMul(x, turned)
            z = MatMul(x, "b.weight")
            w = Gemm<transB=1, alpha=0.5>(x, "c.weight", "c.bias")
            e = Gather("e.weight", ids)
        }}
    """)
    shapes = {"a.weight": (3, 4), "b.weight": (4, 5), "c.weight": (6, 4), "c.bias": (6,), "e.weight": (7, 4)}
    return with_weights(model, shapes, dtype)


def with_weights(model: ir.Model, shapes: dict[str, tuple[int, ...]], dtype: ir.DataType) -> ir.Model:
    inputs = {v.name: v for node in model.graph for v in node.inputs if v is not None}
    for name, shape in shapes.items():
        array = RNG.normal(size=shape).astype(dtype.numpy())
        value = inputs[name]
        value.const_value = ir.Tensor(array, name=name)
        value.type, value.shape = ir.TensorType(dtype), ir.Shape(shape)
        model.graph.register_initializer(value)
    return model


def write(folder: Path, modules: dict[str, tuple[int, int]], rank: int = 2, **config: Any) -> Path:
    folder.mkdir(parents=True)
    tensors = {}
    for module, (out, into) in modules.items():
        kind = "embedding_" if module == "e" else ""
        end = "" if kind else ".weight"
        tensors[f"base_model.model.{module}.lora_{kind}A{end}"] = RNG.normal(size=(rank, into)).astype(np.float32)
        tensors[f"base_model.model.{module}.lora_{kind}B{end}"] = RNG.normal(size=(out, rank)).astype(np.float32)
    safetensors_numpy.save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "lora_alpha": 4, "target_modules": list(modules), **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


FEATURES = {"a": (3, 4), "b": (5, 4), "c": (6, 4), "e": (4, 7)}
OUTPUTS = {"a": 0, "b": 1, "c": 2, "e": 3}


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16])
def test_every_way_a_weight_is_used(tmp_path: Path, dtype: ir.DataType) -> None:
    model = graph(dtype)
    one = write(tmp_path / "one", FEATURES, rank=2)
    two = write(tmp_path / "two", {"b": (5, 4)}, rank=3, use_rslora=True)
    report = keep_adapters(model, {"one": one, "two": two})
    assert report.inputs == [f"{m}.lora_{k}" for m in "abce" for k in "AB"]
    path = tmp_path / "model.onnx"
    save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    assert [v.name for v in load(path).graph.outputs] == ["y", "z", "w", "e"]
    running = session(path)
    assert [v.name for v in running.get_inputs()] == ["x", "ids"]
    assert [v.name for v in running.get_overridable_initializers()] == report.inputs
    numpy = dtype.numpy()
    x, ids = RNG.normal(size=(3, 4)).astype(numpy), np.array([6, 0, 3])
    feeds = {"x": x, "ids": ids}
    values = {n: v.const_value.numpy().astype(np.float32) for n, v in model.graph.initializers.items()}
    wide = x.astype(np.float32)
    base = [
        wide @ values["a.weight"].T,
        wide @ values["b.weight"],
        0.5 * wide @ values["c.weight"].T + values["c.bias"],
        values["e.weight"][ids],
    ]
    tolerance = 1e-5 if numpy == np.float32 else 3e-2

    def check(folder: Path | None, options: Any, scale: float) -> None:
        expected = list(base)
        tensors = safetensors_numpy.load_file(folder / "adapter_model.safetensors") if folder else {}
        for key, a in tensors.items():
            module = key.split(".")[2]
            if "A" in key.split("lora_")[1]:
                change = scale * tensors[key.replace("A", "B")] @ a
                added = change.T[ids] if module == "e" else wide @ change.T
                expected[OUTPUTS[module]] = expected[OUTPUTS[module]] + added
        for found, right in zip(running.run(None, feeds, options), expected, strict=True):
            assert found.dtype == numpy
            np.testing.assert_allclose(found.astype(np.float32), right, rtol=tolerance, atol=tolerance * 4)

    check(None, None, 0)
    first, _held = switched(report.adapters[0], tmp_path)
    check(one, first, 2.0)
    second, _held_too = switched(report.adapters[1], tmp_path)
    check(two, second, 4 / 3**0.5)
    check(None, None, 0)


def test_the_branches_outlive_the_optimizer(tmp_path: Path) -> None:
    """Passes must not take what can be overridden for constant: the optimized model still switches."""
    import graphopt

    model = graph()
    report = keep_adapters(model, {"one": write(tmp_path / "one", FEATURES)})
    save(model, tmp_path / "before.onnx")
    graphopt.optimize(tmp_path / "before.onnx", verify="none").save(tmp_path / "after.onnx")
    feeds = {"x": RNG.normal(size=(3, 4)).astype(np.float32), "ids": np.array([6, 0, 3])}
    options, _held = switched(report.adapters[0], tmp_path)
    before, after = session(tmp_path / "before.onnx"), session(tmp_path / "after.onnx")
    for how in (None, options):
        for right, found in zip(before.run(None, feeds, how), after.run(None, feeds, how), strict=True):
            np.testing.assert_allclose(found, right, atol=1e-5)


def test_a_tied_weight(tmp_path: Path) -> None:
    """The product gets the adapter of the head, and the look-up in the same numbers stays as it is."""
    model = ir.from_onnx_text("""
        <ir_version: 10, opset_import: ["" : 21]>
        agraph (int64[b] ids) => (float[b, 7] logits, float[b, 4] e) {
            e = Gather("embed.weight", ids)
            turned = Transpose<perm=[1, 0]>("embed.weight")
            logits = MatMul(e, turned)
        }
    """)
    with_weights(model, {"embed.weight": (7, 4)}, ir.DataType.FLOAT)
    folder = write(tmp_path / "head", {"lm_head": (7, 4)})
    report = keep_adapters(model, {"head": folder}, tied={"lm_head.weight": "embed.weight"})
    save(model, tmp_path / "m.onnx")
    running, ids = session(tmp_path / "m.onnx"), np.array([1, 5])
    before = running.run(None, {"ids": ids})
    options, _held = switched(report.adapters[0], tmp_path)
    after = running.run(None, {"ids": ids}, options)
    np.testing.assert_array_equal(before[1], after[1])
    parameters = report.adapters[0].parameters
    change = before[1] @ parameters["lm_head.lora_A"] @ parameters["lm_head.lora_B"]
    np.testing.assert_allclose(after[0], before[0] + change, atol=1e-5)


class TestRefused:
    """One sentence, and the graph as it was."""

    def fails(
        self, folder: Path, message: str, model: ir.Model | None = None, kind: type[Exception] = UsageError
    ) -> None:
        model = model or graph()
        before = ir.to_proto(model).SerializeToString()
        with pytest.raises(kind, match=message):
            keep_adapters(model, {"one": folder})
        assert ir.to_proto(model).SerializeToString() == before

    def test_a_method_that_is_not_low_rank(self, tmp_path: Path) -> None:
        folder = tmp_path / "hra"
        folder.mkdir()
        safetensors_numpy.save_file(
            {"base_model.model.a.hra_u": np.ones((4, 2), np.float32)}, folder / "adapter_model.safetensors"
        )
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "HRA"}))
        self.fails(
            folder, "is a HRA adapter, which doesn't only add a product .* so it can't be kept separate; merge it"
        )

    def test_dora(self, tmp_path: Path) -> None:
        self.fails(write(tmp_path / "dora", {"a": (3, 4)}, use_dora=True), "is a DoRA adapter")

    def test_whole_parameters(self, tmp_path: Path) -> None:
        folder = write(tmp_path / "whole", {"a": (3, 4)}, modules_to_save=["c"])
        path = folder / "adapter_model.safetensors"
        tensors = safetensors_numpy.load_file(path)
        safetensors_numpy.save_file({**tensors, "base_model.model.c.bias": np.ones(6, np.float32)}, path)
        self.fails(folder, r"also replaces whole parameters \(c.bias\)")

    def test_experts(self, tmp_path: Path) -> None:
        self.fails(write(tmp_path / "experts", {"a": (3, 4)}, target_parameters=["w"]), "adapts parameters by name")

    def test_another_base(self, tmp_path: Path) -> None:
        self.fails(write(tmp_path / "other", {"a": (3, 9)}), "fits a weight of 3 × 9 features")
        self.fails(write(tmp_path / "none", {"q": (3, 4)}), "the base has no parameter q.weight")

    def test_a_broken_file(self, tmp_path: Path) -> None:
        """Found out before the graph is changed, also in the last tensor of the last adapter."""
        folder = write(tmp_path / "one", FEATURES)
        path = folder / "adapter_model.safetensors"
        tensors = safetensors_numpy.load_file(path)
        tensors["base_model.model.c.lora_B.weight"][2, 1] = np.nan
        safetensors_numpy.save_file(tensors, path)
        self.fails(folder, "c.lora_B.weight has values that are NaN", kind=ModelError)

    def test_twice(self, tmp_path: Path) -> None:
        model, folder = graph(), write(tmp_path / "one", FEATURES)
        keep_adapters(model, {"one": folder})
        self.fails(folder, "the graph has a.lora_A already", model)

    def test_a_weight_used_otherwise(self, tmp_path: Path) -> None:
        model = ir.from_onnx_text("""
            <ir_version: 10, opset_import: ["" : 21]>
            agraph (float[3, 4] x) => (float[3, 4] y) { y = Mul(x, "a.weight") }
        """)
        with_weights(model, {"a.weight": (3, 4)}, ir.DataType.FLOAT)
        self.fails(write(tmp_path / "mul", {"a": (3, 4)}), "uses that weight in Mul and not in a MatMul or Gemm", model)

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        kept = KeptAdapter("one", {"a.lora_A": np.ones((2, 2), np.float32)})
        with pytest.raises(ModelError, match="the adapter one can't be written to"):
            kept.write(tmp_path / "no" / "one.onnx_adapter")


# ---- graphs that torch exports


@dataclass
class Exported:
    make: Callable[[], Any]
    path: Path
    feeds: dict[str, Any]

    def outputs(self, adapter: Path | None = None) -> Any:
        import peft
        import torch

        model = self.make()
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, str(adapter)).eval()
        with torch.no_grad():
            return model(**{n: torch.from_numpy(v) for n, v in self.feeds.items()}).logits.numpy()


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.export
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_exported_models(tmp_path: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft", reason="peft isn't installed, so nothing is compared with it")
    make = {"bert": bert, "gpt2": gpt2}[name]

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits

    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.int64)
    exported = torch.onnx.export(
        Logits().eval(),
        (ids, mask),
        dynamo=True,
        input_names=["input_ids", "attention_mask"],
        verbose=False,
        optimize=False,
    )
    if name == "bert":
        settings = [{"target_modules": ["query", "dense"]}, {"target_modules": ["value", "word_embeddings"], "r": 2}]
        configs = [peft.LoraConfig(**s) for s in settings]
        configs.append(peft.MissConfig(r=4, target_modules=["query", "key"]))
        configs.append(peft.VeraConfig(r=4, target_modules=["query", "value"]))
    else:
        configs = [peft.LoraConfig(r=3, fan_in_fan_out=True, target_modules=["c_attn", "c_proj", "c_fc"])]
    folders = [save_adapter(tmp_path / str(i), make, c, seed=i) for i, c in enumerate(configs)]
    model = exported.model
    report = keep_adapters(model, {f"number-{i}": folder for i, folder in enumerate(folders)})
    save(model, tmp_path / "model.onnx")
    case = Exported(make, tmp_path / "model.onnx", {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    running = session(case.path)
    base = case.outputs()

    def check(options: Any, expected: Any) -> None:
        (found,) = running.run(None, case.feeds, options)
        np.testing.assert_allclose(found, expected, atol=1e-5 * max(1.0, np.abs(expected).max()))

    check(None, base)
    for folder, kept in zip(folders, report.adapters, strict=True):
        options, _held = switched(kept, tmp_path)
        expected = case.outputs(folder)
        assert np.abs(expected - base).max() > 1e-2
        check(options, expected)
    check(None, base)
