"""Whether a graph is well formed: the ONNX checker, shape inference, and what both of them miss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.errors import ModelError
from graphopt.graph.edits import inner_graphs, subgraphs_of, walk
from graphopt.graph.skeleton import first_line, serialized, skeleton

_STANDARD = ("", "ai.onnx", "ai.onnx.ml")
_CHECKER = "onnx.checker: "
_INFERENCE = "Shape inference: "
MOST_PROBLEMS = 50
"""A broken graph can be broken everywhere; the list ends here."""


def nan_weight(model: ir.Model) -> str | None:
    """The name of the first weight that holds NaN, None where none does; reads the weights one by one."""
    step = 1 << 22
    for graph in walk(model):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or not tensor.dtype.is_floating_point():
                continue
            flat = np.asarray(tensor.numpy()).reshape(-1)
            if any(np.isnan(flat[i : i + step].astype(np.float32)).any() for i in range(0, flat.size, step)):
                return str(value.name)
    return None


def check_structure(model: ir.Model) -> list[str]:
    """Find what is wrong with the structure of a model, without touching its weights.

    Beyond onnx.checker and shape inference it finds undefined inputs, names that are made twice (also where a
    subgraph hides an outer name), cycles and nodes out of order, outputs that nothing makes, and operators of a domain
    that isn't imported. Operators of other domains are no error by themselves.

    Declared shapes of values and outputs aren't held against the graph: real files declare false ones.

    Returns:
        The problems, one sentence each; an empty list where there are none.
    """
    problems = list(_walk_model(model))[:MOST_PROBLEMS]
    if problems:
        # The checker stops at the first problem, which is one of these, and says less.
        return problems
    return list(_check_proto(model))


def new_problems(candidate: ir.Model, original: ir.Model) -> list[str]:
    """The structural problems of `candidate` that aren't inherited from `original`.

    onnx is stricter than runtimes and has faults of its own (shape inference of onnx 1.23 refuses every
    `MeanVarianceNormalization`, its checker the experimental operators of old files), so where the checker or shape
    inference already fails on the original, its word on the candidate counts nothing.
    """
    problems = check_structure(candidate)
    if problems and all(map(found_by_onnx, problems)):
        inherited = {p.split(":")[0] for p in check_structure(original) if found_by_onnx(p)}
        return [p for p in problems if p.split(":")[0] not in inherited]
    return problems


def found_by_onnx(problem: str) -> bool:
    """Whether a problem found by `check_structure` is one that only onnx's checker or shape inference sees."""
    return problem.startswith((_CHECKER, _INFERENCE))


def _walk_model(model: ir.Model) -> Iterator[str]:
    yield from _check_imports(model.graph, model.graph.opset_imports, "", model)
    yield from _check_graph(model.graph, set(), set(), "")
    for function in model.functions.values():
        place = f" of function {function.name!r}"
        yield from _check_imports(function.graph, function.opset_imports, place, model)
        yield from _check_graph(function.graph, set(), set(), place)


def _check_imports(graph: ir.Graph, imports: dict[str, int], place: str, model: ir.Model) -> Iterator[str]:
    """A domain needs an import wherever one of its operators is used."""
    missing: dict[str, ir.Node] = {}
    local = {identifier[0] for identifier in model.functions}
    for inner in (graph, *inner_graphs(graph)):
        for node in inner:
            domain = "" if node.domain == "ai.onnx" else node.domain
            if domain in imports or (domain == "" and "ai.onnx" in imports):
                continue
            missing.setdefault(domain, node)
    for domain, node in missing.items():
        kind = "the functions' domain" if domain in local else "the domain"
        yield f"{_label(node)}{place} needs {kind} {domain or 'ai.onnx'!r}, which the model doesn't import."


def _check_graph(graph: ir.Graph, visible: set[ir.Value], outer_names: set[str], place: str) -> Iterator[str]:
    """Check one graph; `visible` and `outer_names` are what the graphs around it offer at this point."""
    names: set[str] = set()
    own: set[ir.Value] = set()

    def declare(value: ir.Value, what: str) -> Iterator[str]:
        own.add(value)
        name = value.name
        if not name:
            if what != "an output of":
                yield f"{what} the graph{place} has no name."
            return
        if name in names:
            yield f"The name {name!r} is made twice{place}."
        elif name in outer_names:
            yield f"The name {name!r}{place} hides a value of an outer graph."
        names.add(name)

    for value in graph.inputs:
        yield from declare(value, "An input of")
    for name, value in graph.initializers.items():
        if value.name != name:
            yield f"The initializer {name!r}{place} goes by the name {value.name!r}."
        if not value.is_graph_input():
            yield from declare(value, "An initializer of")
        if value.const_value is None:
            yield f"The initializer {name!r}{place} has no data."
    made_here = {out for node in graph for out in node.outputs}
    for node in graph:
        for used in node.inputs:
            if used is None or used in own or used in visible:
                continue
            if used in made_here:
                yield f"{_label(node)}{place} uses {used.name!r} before it is made: a cycle, or nodes out of order."
            else:
                yield f"{_label(node)}{place} uses {used.name!r}, which nothing makes."
        for inner in subgraphs_of(node):
            yield from _check_graph(inner, visible | own, outer_names | names, f" in {_label(node)}{place}")
        for value in node.outputs:
            yield from declare(value, "an output of")
    for value in graph.outputs:
        if value not in own and value not in visible:
            yield f"The output {value.name!r}{place} is made by nothing."
    if place == "" and not graph.outputs:
        yield "The graph has no outputs."


def _label(node: ir.Node) -> str:
    return f"{node.op_type} {node.name!r}" if node.name else node.op_type


def _check_proto(model: ir.Model) -> Iterator[str]:
    try:
        proto, weights = skeleton(model)
    except ModelError as error:
        yield str(error)
        return
    # Large weights become inputs, which have type and shape but no data.
    for weight in weights:
        declared = proto.graph.input.add()
        declared.name = weight.name
        declared.type.tensor_type.elem_type = weight.proto.data_type
        declared.type.tensor_type.shape.dim.extend(
            onnx.TensorShapeProto.Dimension(dim_value=d) for d in weight.proto.dims
        )
    names = {w.name for w in weights}
    kept = [i for i in proto.graph.initializer if i.name not in names]
    overridable = names & {i.name for i in model.graph.inputs}
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    if overridable:
        inputs = list(dict((i.name, i) for i in proto.graph.input).values())
        del proto.graph.input[:]
        proto.graph.input.extend(inputs)
    data = serialized(proto)
    try:
        onnx.checker.check_model(data)
    except Exception as error:
        yield f"{_CHECKER}{_message(error)}"
        return
    # Declared types and shapes of values may be false; what the operators say can't be.
    for value in proto.graph.output:
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
    del proto.graph.value_info[:]
    strict = not model.functions and all(
        node.domain in _STANDARD for graph in (model.graph, *inner_graphs(model.graph)) for node in graph
    )
    try:
        onnx.shape_inference.infer_shapes(serialized(proto), check_type=True, strict_mode=strict)
    except Exception as error:
        yield f"{_INFERENCE}{_message(error)}"


def _message(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:4])[:400] or first_line(error)
