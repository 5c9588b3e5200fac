"""Small models made for the tests of calibration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.calibration.request import Request
from graphopt.calibration.statistics import AbsMax
from graphopt.graph.load import normalize
from graphopt.passes.base import Guarantee, Pass
from graphopt.runtime_ops.memory_session import make_session, run

HIDDEN, INNER = 8, 12


def parse(text: str, weights: Mapping[str, Any], opset: int = 21) -> ir.Model:
    """A model from the text form of ONNX, and the initializers that it reads."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}]>\n{text}')
    for name, array in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(array), name))
    model = ir.from_proto(proto)
    normalize(model)
    return model


def residual(layers: int, hidden: int = HIDDEN, inner: int = INNER, seed: int = 0) -> ir.Model:
    """Layers x + tanh(x·A)·B in a row."""
    rng = np.random.default_rng(seed)
    weights, lines = {}, []
    for i in range(layers):
        weights[f"a{i}"] = (rng.normal(size=(hidden, inner)) / hidden**0.5).astype(np.float32)
        weights[f"b{i}"] = (rng.normal(size=(inner, hidden)) / inner**0.5).astype(np.float32)
        lines += [f"u{i} = MatMul(x{i}, a{i})", f"t{i} = Tanh(u{i})", f"d{i} = MatMul(t{i}, b{i})"]
        lines.append(f"x{i + 1} = Add(x{i}, d{i})")
    text = "\n".join(["x0 = Identity(x)", *lines, f"y = Identity(x{layers})"])
    return parse(f"g (float[b, t, {hidden}] x) => (float[b, t, {hidden}] y) {{\n{text}\n}}", weights)


def value(model: ir.Model, name: str) -> ir.Value:
    """A value of the main graph by its name."""
    return next(v for v in (*model.graph.inputs, *(o for n in model.graph for o in n.outputs)) if v.name == name)


def activations(
    model: ir.Model, feeds: Sequence[Mapping[str, np.ndarray]], names: Sequence[str]
) -> dict[str, list[np.ndarray]]:
    """What values of a model are for each sample, from the whole model at once."""
    copy = model.clone()
    wanted = [value(copy, name) for name in names]
    for one in wanted:
        if one not in copy.graph.outputs and not one.is_graph_input():
            if one.type is None:
                one.type = ir.TensorType(ir.DataType.FLOAT)
            copy.graph.outputs.append(one)
    session = make_session(copy, "none")
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for feed in feeds:
        outputs = dict(zip([o.name for o in session.get_outputs()], run(session, feed), strict=True))
        for name in names:
            found[name].append(outputs[name] if name in outputs else feed[name])
    return found


class Observed(Pass):
    """A pass that looks at what each MatMul multiplies, and changes nothing."""

    name: ClassVar[str] = "observed"
    family: ClassVar[str] = "test"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    needs: tuple[str, ...] = ("absmax",)

    def apply(self, model: ir.Model) -> bool:
        """See the base."""
        assert self.calibration is not None
        requests = {n: Request(n.inputs[0], AbsMax()) for n in model.graph if n.op_type == "MatMul" and n.inputs[0]}
        found = self.calibration.gather(model, list(requests.values()))
        for node, request in requests.items():
            self.left(node, f"up to {float(found[request].array):.4f}")
        return False
