"""What a model is for, guessed from its graph: which quality it is judged by."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Literal

import onnx_ir as ir

from graphopt.graph.input_roles import InputRoles
from graphopt.graph.kv_interface import kv_interface

Task = Literal["language", "embedding", "classification", "detection", "recognition", "generic"]

_MOVES = ("Identity", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "QuantizeLinear",
          "DequantizeLinear")  # fmt: skip
_PROBABLE = ("Softmax", "LogSoftmax", "Sigmoid")
_CLASSES = re.compile("logit|prob|label|score|class|cls|pred|softmax", re.IGNORECASE)
_EMBEDDED = re.compile("embed|hidden|pool|feature", re.IGNORECASE)
_FEWEST_CHARACTERS = 30
_STATE = re.compile("state|cache|past|present", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Guess:
    """The task of a model.

    Attributes:
        task: The task.
        reason: Why, as a clause that goes on after "because it has".
        output: The output that is judged, where it is one.
        mask: Of an embedder that gives hidden states, the input that says which tokens count.
        characters: Of a recogniser, what its classes write, where the file says it.
        classes: Of a detector, the number of its classes, where the file says it.
    """

    task: Task
    reason: str
    output: str | None = None
    mask: str | None = None
    characters: tuple[str, ...] | None = None
    classes: int | None = None


def guess_task(model: ir.Model, task: Task | None = None) -> Guess:
    """Tell what a model is for, or for a task that is given what its judge needs to know.

    Args:
        model: The model.
        task: The task, where it is known.

    Returns:
        The task; "generic" where nothing speaks for another one.
    """
    properties = dict(model.metadata_props)
    floats = [v for v in model.graph.outputs if v.name and v.dtype is not None and v.dtype.is_floating_point()]
    found = _told(properties, floats) or _from_graph(model, floats)
    if task is None or task == found.task:
        return found
    given = Guess(task, "this task given", characters=_characters(properties, None), classes=_class_count(properties))
    if task == "embedding":
        return dataclasses.replace(_embedding(model, floats) or given, reason=given.reason)
    if task == "recognition":
        return dataclasses.replace(given, output=_named(next((v for v in floats if _rank(v) == 3), None)))
    if task == "classification":
        return dataclasses.replace(given, output=_named(next((v for v in floats if _rank(v) in (None, 2)), None)))
    return given


def _told(properties: Mapping[str, str], floats: list[ir.Value]) -> Guess | None:
    """What the file's metadata says."""
    if (said := properties.get("task")) in ("detect", "classify"):
        task: Task = "detection" if said == "detect" else "classification"
        output = _named(next((v for v in floats if _rank(v) == 2), None)) if task == "classification" else None
        return Guess(task, f"the task {said!r} in its metadata", output, classes=_class_count(properties))
    for value in floats:
        if _rank(value) == 3 and (characters := _characters(properties, _last(value))) is not None:
            reason = f"a list of characters in its metadata and scores of each of them in {value.name!r}"
            return Guess("recognition", reason, value.name, characters=characters)
    return None


def _from_graph(model: ir.Model, floats: list[ir.Value]) -> Guess:
    decoder = kv_interface(model)
    if decoder is not None and not decoder.encoder_decoder and decoder.token_ids and decoder.logits:
        return Guess("language", f"logits over a vocabulary ({decoder.logits!r}) and a KV cache", decoder.logits)
    own = [v for v in model.graph.inputs if not v.is_initializer()]
    image = any(_rank(v) == 4 and v.dtype is not None and v.dtype.is_floating_point() for v in own)
    if image and (detector := _detection(floats)) is not None:
        return detector
    recurrent = any(_STATE.search(v.name or "") for v in [*own, *model.graph.outputs])
    if image and len(floats) == 1 and _rank(floats[0]) == 3 and (_last(floats[0]) or 0) >= _FEWEST_CHARACTERS:
        maker = _maker(floats[0])
        if maker is not None and maker.op_type in _PROBABLE:
            return Guess("recognition", f"scores at each step in {floats[0].name!r}", floats[0].name)
    if decoder is None and InputRoles.read([v for v in own if not _means_type(v)]).token_ids is not None:
        classifier = next((v for v in floats if _rank(v) == 2 and _CLASSES.search(v.name or "")), None)
        if classifier is not None:
            return Guess("classification", f"tokens as input and scores in {classifier.name!r}", classifier.name)
        if (embedder := _embedding(model, floats)) is not None:
            return embedder
    if len(floats) == 1 and not recurrent and _rank(floats[0]) == 2 and _last(floats[0]) is not None:
        output, maker = floats[0], _maker(floats[0])
        probable = maker is not None and maker.op_type in _PROBABLE
        if _last(output) == 1 and not probable:
            return Guess("generic", f"one number for each sample in {output.name!r}")
        if probable or _CLASSES.search(output.name or "") or (image and not _EMBEDDED.search(output.name or "")):
            scores = "one score" if _last(output) == 1 else f"{_last(output)} scores"
            return Guess("classification", f"one output of {scores} ({output.name!r})", output.name)
        if image:
            return Guess("embedding", f"one output called {output.name!r}", output.name)
    return Guess("generic", "nothing that tells another task")


def _detection(floats: list[ir.Value]) -> Guess | None:
    """Outputs of scores and boxes: some that are called so, or pairs for several scales."""
    boxes = [v for v in floats if re.search("box|bbox", v.name or "", re.IGNORECASE) and _last(v) in (4, None)]
    if boxes and len(floats) > 1:
        return Guess("detection", f"boxes in {boxes[0].name!r}")
    triples = [v for v in floats if _rank(v) == 3]
    anchors = [v.shape[1] for v in triples if v.shape is not None and isinstance(v.shape[1], int)]
    if len(anchors) == len(triples) >= 2 and all(anchors.count(n) == 2 for n in anchors):
        return Guess("detection", f"two outputs for the anchors of each of {len(anchors) // 2} scales")
    return None


def _embedding(model: ir.Model, floats: list[ir.Value]) -> Guess | None:
    """An embedding by its name, hidden states, or what else has a vector for each sample."""
    own = [v for v in model.graph.inputs if not v.is_initializer()]
    # Scores of each token over a vocabulary, or over labels, are no states.
    hidden = [v for v in floats if _rank(v) == 3 and not _CLASSES.search(v.name or "")]
    vectors = [v for v in floats if _rank(v) == 2]
    named = next((v for v in vectors if re.search("embed", v.name or "", re.IGNORECASE)), None)
    chosen = named or next(iter(hidden), None) or next(iter(vectors), None)
    if chosen is None:
        return None
    if chosen not in hidden:
        return Guess("embedding", f"a vector for each sample in {chosen.name!r}", chosen.name)
    mask = InputRoles.read([v for v in own if not _means_type(v)]).attention_mask
    averaged = "averaged over the tokens that count" if mask else "averaged"
    return Guess("embedding", f"hidden states in {chosen.name!r}, which are {averaged}", chosen.name, mask)


def _characters(properties: Mapping[str, str], classes: int | None) -> tuple[str, ...] | None:
    """The characters of a recogniser (PaddleOCR writes one a line), with the space that it may add at the end."""
    text = properties.get("character")
    if text is None:
        return None
    characters = text.split("\n")
    if characters and characters[-1] == "":
        characters.pop()
    if classes is not None and classes - 1 not in (len(characters), len(characters) + 1):
        return None  # class names of another sort of model
    return (*characters, " ")


def _class_count(properties: Mapping[str, str]) -> int | None:
    """The number of entries of a dictionary of names, as Ultralytics writes it: {0: 'person', 1: ...}."""
    found = re.findall(r"[{,]\s*\d+\s*:", properties.get("names", ""))
    return len(found) or None


def _maker(value: ir.Value) -> ir.Node | None:
    """What computes a value, before moves and casts."""
    node = value.producer()
    while node is not None and node.op_type in _MOVES and node.inputs and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    return node


def _means_type(value: ir.Value) -> bool:
    """Whether an input says which of two texts a token belongs to."""
    return re.search("type|segment", value.name or "", re.IGNORECASE) is not None


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)


def _last(value: ir.Value) -> int | None:
    size = value.shape[-1] if value.shape is not None and len(value.shape) else None
    return size if isinstance(size, int) else None


def _named(value: ir.Value | None) -> str | None:
    return None if value is None else value.name
