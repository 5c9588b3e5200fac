"""The raise passes of activations, softmax and norms on what PyTorch's two exporters write today."""

from __future__ import annotations

import collections
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.passes import registry

pytestmark = pytest.mark.export

RECIPE = (
    "inline-functions", "lift-constants", "eliminate-dead-code", "deduplicate-initializers", "eliminate-identities",
    "eliminate-common-subexpressions", "simplify-shapes", "convert-opset", "fold-constants", "raise-instance-norm",
    "raise-group-norm", "raise-layer-norm", "raise-hard-swish", "raise-softmax", "raise-dynamic-tanh",
)  # fmt: skip


def modules() -> dict[str, tuple[Callable[..., Any], dict[str, int]]]:
    """What is written by hand in PyTorch, and the operators that it becomes."""
    import torch
    from torch.nn import functional

    gain, bias = torch.linspace(0.5, 2, 128), torch.linspace(-1, 1, 128)

    def spread(x: Any, axes: tuple[int, ...]) -> Any:
        return (x - x.mean(axes, keepdim=True)) / torch.sqrt(x.var(axes, keepdim=True, unbiased=False) + 1e-5)

    def grouped(x: Any) -> Any:
        rows = spread(x.reshape(x.shape[0], 4, -1), (-1,))
        return rows.reshape(x.shape) * gain.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)

    def in_groups(x: Any) -> Any:
        n, c, h, w = x.shape
        rows = spread(x.reshape(n, 4, c // 4, h, w), (2, 3, 4)) * gain.view(1, 4, 32, 1, 1)
        return rows.reshape(n, c, h, w)

    return {
        "hard swish": (lambda x: x * functional.relu6(x + 3) / 6, {"HardSwish": 1}),
        "hard swish, divided first": (lambda x: x / 6 * torch.clamp(x + 3, 0, 6), {"HardSwish": 1}),
        "hard sigmoid": (lambda x: torch.clamp(0.2 * x + 0.5, 0, 1), {"HardSigmoid": 1}),
        "softmax": (lambda x: torch.exp(x - x.amax(-1, keepdim=True))
                    / torch.exp(x - x.amax(-1, keepdim=True)).sum(-1, keepdim=True), {"Softmax": 1}),
        "log softmax": (lambda x: x - torch.logsumexp(x, 1, keepdim=True), {"LogSoftmax": 1}),
        "instance norm": (lambda x: spread(x, (2, 3)) * gain.view(-1, 1, 1), {"InstanceNormalization": 1}),
        "group norm": (torch.nn.GroupNorm(4, 128), {"GroupNormalization": 1}),
        "group norm over rows": (grouped, {"GroupNormalization": 1}),
        "group norm over groups": (in_groups, {"GroupNormalization": 1}),
        "channels-first layer norm": (lambda x: gain.view(-1, 1, 1) * spread(x, (1,)) + bias.view(-1, 1, 1),
                                      {"LayerNormalization": 1, "Transpose": 2}),
        "dynamic tanh": (lambda x: torch.tanh(x * 0.5 / 0.25) * gain.view(-1, 1, 1) + bias.view(-1, 1, 1),
                         {"Mul": 2, "Tanh": 1, "Add": 1}),
    }  # fmt: skip


@pytest.mark.parametrize("dynamo", [True, False], ids=["torch.export", "TorchScript"])
@pytest.mark.filterwarnings("ignore")
def test_export(dynamo: bool) -> None:
    torch = pytest.importorskip("torch")
    ort = pytest.importorskip("onnxruntime")
    functions = modules()

    class Module(torch.nn.Module):  # type: ignore[name-defined, misc]
        """All of them, each on an input of its own, so that no export takes part of one for another."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = functions["group norm"][0]

        def forward(self, *inputs: Any) -> Any:
            return tuple(function(x) for (function, _), x in zip(functions.values(), inputs, strict=True))

    generator = torch.Generator().manual_seed(0)
    module = Module().eval()
    inputs = tuple(2 * torch.randn(2, 128, 6, 7, generator=generator) for _ in functions)
    if dynamo:
        sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
        dynamic = {"inputs": tuple(sizes for _ in inputs)}
        program = torch.onnx.export(
            module, inputs, dynamo=True, opset_version=20, verbose=False, dynamic_shapes=dynamic
        )
        proto = program.model_proto
    else:
        file, names = io.BytesIO(), [f"x{i}" for i in range(len(inputs))]
        axes = {name: {0: f"{name}_n", 2: f"{name}_h", 3: f"{name}_w"} for name in names}
        torch.onnx.export(module, inputs, file, dynamo=False, opset_version=17, input_names=names, dynamic_axes=axes)
        proto = onnx.load_from_string(file.getvalue())
    model = ir.from_proto(proto)
    left = []
    for key in RECIPE:
        rule = registry.make(key)
        rule(model)
        if key.startswith("raise-"):
            left += [site.detail for site in rule.sites if site.outcome == "left"]
    assert left == []
    for value, (name, (_, expected)) in zip(model.graph.outputs, functions.items(), strict=True):
        assert behind(value) == expected, name
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        wanted = module(*inputs)
    got = session.run(None, {i.name: x.numpy() for i, x in zip(session.get_inputs(), inputs, strict=True)})
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-4, atol=1e-5)


def behind(value: ir.Value) -> dict[str, int]:
    """The operators that an output is made by."""
    found, queue = {}, [value]
    for current in queue:
        node = current.producer()
        if node is not None and node.op_type != "Constant":
            found[node] = node.op_type
            queue.extend(v for v in node.inputs if v is not None)
    return dict(collections.Counter(found.values()))
