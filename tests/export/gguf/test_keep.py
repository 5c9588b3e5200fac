"""Blocks kept in a graph: the same numbers, the sums and the shared weight made once, and what stays float says why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytestmark = pytest.mark.export
ort = pytest.importorskip("onnxruntime")
gguf = pytest.importorskip("gguf")
pytest.importorskip("torch")

from gguf import GGMLQuantizationType as Type  # noqa: E402
from gguf_files import tiny, write  # noqa: E402

from graphopt.errors import UsageError  # noqa: E402
from graphopt.export.dependencies import quiet  # noqa: E402
from graphopt.export.gguf import GGUFWeights, from_gguf  # noqa: E402
from graphopt.export.gguf.keep import keep_quantized  # noqa: E402
from graphopt.graph.load import load  # noqa: E402
from graphopt.graph.save import save  # noqa: E402

LAYER = "model.layers.0"
EMBEDDING = "model.embed_tokens.weight"
QKV = [f"{LAYER}.self_attn.{part}_proj.weight" for part in "qkv"]


def weights(folder: Path, kind: Type, **settings: object) -> GGUFWeights:
    settings = {"hidden_size": 256, "intermediate_size": 512, **settings}
    return from_gguf(write(folder / "m.gguf", "llama", tiny("llama", **settings), kind)).weights


class Build:
    """A graph of products of one input [B, S, 256] with weights of the file."""

    def __init__(self, made: GGUFWeights) -> None:
        self.made, self.nodes, self.values = made, [], {}
        self.outputs: list[ir.Value] = []
        self.x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "S", 256]))
        self.ids = ir.Value(name="ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["B", "S"]))

    def constant(self, name: str, array: np.ndarray | None = None) -> ir.Value:
        """The parameter as a lazy tensor under its name, or an array under another."""
        if name not in self.values:
            tensor = self.made.tensor(name) if array is None else ir.tensor(array, name=name)
            self.values[name] = ir.Value(
                name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape)
            )
        return self.values[name]

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes, outputs=[ir.Value(name=f"v{len(self.nodes)}")])
        self.nodes.append(node)
        return node.outputs[0]

    def product(self, weight: ir.Value, source: ir.Value | None = None, transpose: bool = True) -> ir.Value:
        other = self.op("Transpose", weight, perm=[1, 0]) if transpose else weight
        return self.output(self.op("MatMul", source or self.x, other))

    def output(self, value: ir.Value) -> ir.Value:
        value.type = ir.TensorType(ir.DataType.FLOAT)
        self.outputs.append(value)
        return value

    def model(self) -> ir.Model:
        graph = ir.Graph(
            [self.x, self.ids],
            self.outputs,
            nodes=self.nodes,
            initializers=list(self.values.values()),
            opset_imports={"": 21},
            name="g",
        )
        return ir.Model(graph, ir_version=10)


def run(path: Path, rows: int = 3) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    feeds = {
        "x": generator.normal(size=(2, rows, 256)).astype(np.float32),
        "ids": generator.integers(0, 96, (2, rows)),
    }
    return ort.InferenceSession(str(path)).run(None, feeds)


def kept(folder: Path, build: Build, rows: int = 3, **options: Any) -> tuple[ir.Model, Any, float]:
    """The graph with its blocks kept, the report, and the largest relative error of an output, run from files."""
    model = build.model()
    save(model, folder / "float.onnx")
    names = [value.name for value in model.graph.outputs]
    report = keep_quantized(model, build.made, **options)
    assert [value.name for value in model.graph.outputs] == names
    save(model, folder / "kept.onnx")
    pairs = zip(run(folder / "float.onnx", rows), run(folder / "kept.onnx", rows), strict=True)
    return model, report, max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in pairs)


def count(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


KINDS = [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q4_K, Type.Q5_K, Type.Q6_K]
EIGHT_BITS = (Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q5_K, Type.Q6_K)
WITH_OFFSETS = (Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K)
EXACT, TWICE = 2e-6, 2e-4
"""Relative errors allowed: of a float32 sum, and of inputs rounded to twice 8 bits, which all operators of 8 bits do."""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_products_are_the_same(tmp_path: Path, kind: Type) -> None:
    build = Build(weights(tmp_path, kind))
    for name in QKV:
        build.product(build.constant(name))
    model, report, error = kept(tmp_path, build, inputs="float32")
    assert error < (TWICE if kind in EIGHT_BITS else EXACT)
    assert report.kept == {kind.name: QKV}
    assert report.left == []
    assert count(model)["MatMulNBits"] == (2 if kind in EIGHT_BITS else 1)
    assert count(model)["ReduceSum"] == (kind in WITH_OFFSETS)
    stored = [v.const_value for v in model.graph.initializers.values() if (v.name or "").startswith(QKV[0])]
    assert report.bytes_after == sum(tensor.nbytes for tensor in stored)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_an_embedding_and_its_head_are_one_initializer(tmp_path: Path, kind: Type) -> None:
    build = Build(weights(tmp_path, kind, tie_word_embeddings=True))
    table = build.constant(EMBEDDING)
    build.output(build.op("Gather", table, build.ids))
    build.product(table)
    model, report, error = kept(tmp_path, build, inputs="float32")
    assert error < (TWICE if kind in EIGHT_BITS else EXACT)
    assert report.kept == {kind.name: [EMBEDDING]}
    readers = {node.op_type: node for node in model.graph}
    assert readers["GatherBlockQuantized"].inputs[0] is readers["MatMulNBits"].inputs[1]
    size = load(tmp_path / "kept.onnx").graph.initializers[f"{EMBEDDING}.integers"].const_value.nbytes
    assert size == 96 * 256 // (1 if kind in EIGHT_BITS else 2)
    assert (tmp_path / "kept.onnx").stat().st_size < size + 96 * 256 // 16 * 8 + 9000


@pytest.mark.parametrize("inputs", ["int8", "int8x2", "float32"])
def test_sums_of_blocks_are_made_once_for_separate_products(tmp_path: Path, inputs: str) -> None:
    build = Build(weights(tmp_path, Type.Q4_1))
    for name in QKV:
        build.product(build.constant(name))
    model, _, error = kept(tmp_path, build, inputs=inputs, merge=False)
    assert error < {"int8": 2e-2, "int8x2": TWICE, "float32": EXACT}[inputs]
    # And so is what rounding takes from the input, which one more product tells.
    assert count(model)["MatMulNBits"] == (4 if inputs == "int8x2" else 3)
    assert (count(model)["ReduceSum"], count(model)["Sub"]) == (1, inputs == "int8x2")
    levels = {n.attributes.get_int("accuracy_level") for n in model.graph if n.op_type == "MatMulNBits"}
    assert levels == {0 if inputs == "float32" else 4}


@pytest.mark.parametrize("rows", [1, 2, 5, 33])
def test_inputs_rounded_twice_at_any_number_of_rows(tmp_path: Path, rows: int) -> None:
    build = Build(weights(tmp_path, Type.Q4_1))
    build.product(build.constant(QKV[0]))
    _, _, once = kept(tmp_path, build, inputs="int8", rows=rows)
    build = Build(build.made)
    build.product(build.constant(QKV[0]))
    _, _, twice = kept(tmp_path, build, inputs="int8x2", rows=rows)
    assert twice < TWICE
    assert twice < once / 50


def test_weights_known_by_their_content(tmp_path: Path) -> None:
    made = weights(tmp_path, Type.Q4_1)
    build = Build(made)
    arrays = [made.tensor(name).numpy() for name in QKV]
    build.product(build.constant("val_1", np.ascontiguousarray(arrays[0].T)), transpose=False)
    build.product(build.constant("val_2", np.concatenate([arrays[1], arrays[2]])))
    hidden = build.op("Reshape", build.x, build.constant("two", np.array([-1, 256])))
    hidden.type, hidden.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["T", 256])
    bias = build.constant("bias", np.linspace(-9, 9, 512, dtype=np.float32))
    gate, up = (made.tensor(f"{LAYER}.mlp.{part}_proj.weight").numpy() for part in ("gate", "up"))
    build.output(build.op("Gemm", hidden, build.constant("val_3", gate), bias, transB=1))
    build.output(build.op("Gemm", hidden, build.constant("val_4", np.ascontiguousarray(up.T))))
    model, report, error = kept(tmp_path, build, inputs="float32")
    assert error < EXACT
    assert report.kept == {"Q4_1": ["val_1", "val_2", "val_3", "val_4"]}
    assert "Gemm" not in count(model)
    assert count(model)["MatMulNBits"] == 2


def test_what_stays_float_says_why(tmp_path: Path) -> None:
    made = weights(tmp_path, Type.Q4_1)
    build = Build(made)
    build.product(build.constant(QKV[0]))
    changed = made.tensor(QKV[1]).numpy().copy()
    changed[7, 3] += 1
    build.product(build.constant(QKV[1], changed))
    build.product(build.constant("other", np.ones((256, 32), np.float32)), transpose=False)
    _, report, error = kept(tmp_path, build, inputs="float32")
    assert error < EXACT
    assert report.kept == {"Q4_1": [QKV[0]]}
    assert [(left.name, left.reason) for left in report.left] == [
        (QKV[1], "1 of its 128 rows aren't in the file"),
        ("other", "it isn't in the file"),
    ]
    assert report.left[0].nbytes == 128 * 256 * 4


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q2_K, Type.Q3_K], ids=lambda kind: kind.name)
def test_types_without_a_grid_stay_float(tmp_path: Path, kind: Type) -> None:
    build = Build(weights(tmp_path, kind))
    build.product(build.constant(QKV[0]))
    model, report, error = kept(tmp_path, build)
    assert error == 0
    assert not report.kept
    assert [left.reason for left in report.left] == [
        f"it is stored as {kind.name}, which no integer operator takes without loss"
    ]
    assert "com.microsoft" not in model.graph.opset_imports


def test_a_second_time_changes_nothing(tmp_path: Path) -> None:
    build = Build(weights(tmp_path, Type.Q4_1))
    build.product(build.constant(QKV[0]))
    model, _, _ = kept(tmp_path, build)
    before = count(model)
    assert not keep_quantized(model, build.made).kept
    assert count(model) == before


def test_other_inputs(tmp_path: Path) -> None:
    build = Build(weights(tmp_path, Type.Q4_1))
    with pytest.raises(UsageError, match="inputs can't be 'int4'; use int16, int8, int8x2, float32"):
        keep_quantized(build.model(), build.made, inputs="int4")


@pytest.mark.parametrize(("family", "inputs"), [("llama", "int8x2"), ("gemma3", "float32")])
def test_a_model_from_its_file_to_the_graph_and_back(tmp_path: Path, family: str, inputs: str) -> None:
    import torch

    settings = {"tie_word_embeddings": True, "num_hidden_layers": 2}
    made = from_gguf(write(tmp_path / "m.gguf", family, tiny(family, **settings), Type.Q4_1))
    with quiet():
        module = made.model_class._from_config(made.config, attn_implementation="eager").eval().requires_grad_(False)
    state = {name: torch.from_numpy(made.weights.tensor(name).numpy().copy()) for name in made.weights.names()}
    module.load_state_dict(state, strict=False)
    module.tie_weights()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, use_cache=False).logits

    ids = torch.arange(3, 15)[None]
    with torch.no_grad(), quiet():
        expected = module(input_ids=ids, use_cache=False).logits.numpy()
        program = torch.onnx.export(Logits().eval(), (ids,), dynamo=True, input_names=["input_ids"], opset_version=21)
    report = keep_quantized(program.model, made.weights, inputs=inputs)
    # The exporter has folded the head's transpose, so it is a weight of its own; its integers are the embedding's.
    assert {kind: len(names) for kind, names in report.kept.items()} == {"Q4_1": 7 * 2 + 2}
    assert report.left == []
    (embedding,) = (node for node in program.model.graph if node.op_type == "GatherBlockQuantized")
    assert len(embedding.inputs[0].uses()) == 2
    save(program.model, tmp_path / "kept.onnx")
    (found,) = ort.InferenceSession(str(tmp_path / "kept.onnx")).run(None, {"input_ids": ids.numpy()})
    assert np.abs(found - expected).max() / np.abs(expected).max() < (1e-3 if inputs == "int8x2" else 2e-5)
