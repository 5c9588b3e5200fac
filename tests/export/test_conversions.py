"""What transformers' converters make of tensors in files: the same as of tensors in memory, and no more read than needed."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")
loading = pytest.importorskip("transformers.core_model_loading")
safetensors_torch = pytest.importorskip("safetensors.torch")

from graphopt.export.conversions import _Conversion  # noqa: E402
from graphopt.export.safetensors_files import read_header  # noqa: E402
from graphopt.export.torch_tensors import as_torch  # noqa: E402
from graphopt.graph.streamed import StreamedTensor, transposed  # noqa: E402

EXPERTS = 3
MODULE = SimpleNamespace(config=SimpleNamespace(num_attention_heads=2))
STACK = ["e.*.a.weight", "e.*.b.weight"]


def converter(sources: Any, targets: Any, *operations: Any) -> Any:
    return loading.WeightConverter(sources, targets, operations=list(operations))


def merge(dim: int = 0) -> Any:
    return loading.MergeModulelist(dim)


CASES = {
    "stacked": (lambda: converter("e.*.a.weight", "e.a", merge()), EXPERTS),
    "stacked and fused": (lambda: converter(STACK, "e.ab", merge(), loading.Concatenate(1)), EXPERTS),
    "fused and transposed": (
        lambda: converter(STACK, "e.ab", merge(), loading.Concatenate(1), loading.Transpose(1, 2)),
        EXPERTS,
    ),
    # These mix the experts, so that one expert's part can't be made alone.
    "fused over experts": (lambda: converter(STACK, "e.ab", merge(), loading.Concatenate(0)), 1),
    "stacked last": (lambda: converter("e.*.a.weight", "e.a", merge(2)), 1),
    "experts transposed away": (lambda: converter("e.*.a.weight", "e.a", merge(), loading.Transpose(0, 1)), 1),
    "one tensor": (lambda: converter("e.0.a.weight", "a.weight", loading.Transpose(0, 1)), 1),
    "columns": (lambda: converter("e.0.a.weight", ["a.weight", "b.weight"], loading.Chunk(1)), 1),
    "rows": (lambda: converter("e.0.a.weight", ["a.weight", "b.weight"], loading.Chunk(0)), 0),
    "heads": (lambda: converter("e.0.a.weight", "a.weight", loading.PermuteForRope()), 1),
}
"""The converter, and in how many pieces what it makes is computed (0: it lies in the file as it is)."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ir.TensorProtocol]:
    torch.manual_seed(0)
    tensors = {f"e.{i}.{n}.weight": torch.randn(8, 6).bfloat16() for i in range(EXPERTS) for n in "ab"}
    file: Path = tmp_path_factory.mktemp("files") / "f.safetensors"
    safetensors_torch.save_file(tensors, file)
    return read_header(file)


@pytest.mark.parametrize("case", CASES)
def test_as_in_memory(stored: dict[str, Any], case: str) -> None:
    make, pieces = CASES[case]
    conversion = _Conversion(make(), MODULE, "")
    for name in sorted(stored):
        target, pattern = conversion.converter.rename_source_key(name)
        if pattern is not None:
            conversion.target = target
            conversion.sources[pattern].append(stored[name])
    real = {pattern: [as_torch(t).clone() for t in members] for pattern, members in conversion.sources.items()}
    expected = conversion.run(real)
    found = conversion.results()
    assert set(found) == set(expected)
    for name, value in expected.items():
        tensor = found[name]
        assert tuple(tensor.shape.numpy()) == tuple(value.shape)
        for _ in range(2):
            assert torch.equal(as_torch(tensor), value)
        if isinstance(tensor, StreamedTensor):
            assert len(list(tensor.blocks())) == pieces
        else:
            assert isinstance(tensor, ir.ExternalTensor)
            assert pieces == 0
        for order in itertools.permutations(range(value.ndim)):
            other = transposed(tensor, order)
            assert torch.equal(as_torch(other), value.permute(order))
            if pieces == EXPERTS and isinstance(other, StreamedTensor) and order[0] == 0:
                assert len(list(other.blocks())) == EXPERTS
