"""What a result takes for granted about its inputs, where a pass needed it: given by the user, noted in the model's
metadata by the pass that relied on it, and checked wherever the model is run or compared.

| assumption | holds where | example |
|---|---|---|
| `no-padding` | the attention mask is all ones | one prompt at a time, or prompts of one length |
| `no-left-padding` | each row of the mask is ones, then zeros; what comes out at padded positions is unspecified | prompts of several lengths, padded at the end |
| `batch=1` | the batch is 1 | a chat program |
| `no-batched-chunks` | the batch is 1, or one token comes at a time, or the cache is empty | batched generation without chunked prefill |
| `counted-positions` | position ids count up from the number of tokens in the cache (those of padding may be anything) | position ids as generation makes them |
| `max-length=N` | past and new tokens together are at most N | a context of 2048 tokens |

`no-padding` implies `no-left-padding`, `batch=1` implies `no-batched-chunks`, and a length implies every longer one.
"""  # noqa: E501 (a table)

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt.errors import ModelError, UsageError

ASSUMPTIONS_KEY = "graphopt.assumptions"
"""Metadata key under which a model says what it takes for granted: a JSON list of {"assumption", "inputs" (name by
role), "reason", "pass"}."""

MAX_LENGTH = "max-length"


@dataclasses.dataclass(frozen=True)
class Kind:
    """One assumption that exists.

    Attributes:
        name: As it is written; "max-length=N" stands for any N.
        meaning: Where it holds, as a clause.
        example: For whom that is so.
        roles: The inputs that show whether it holds, as alternatives of roles: "mask" is a 0/1 mask [B, T] over past
            and new tokens, "ids" the token ids or embeddings [B, S, ...], "positions" the position ids [B, S], "past"
            the first key cache [B, H, P, D].
        implies: Names of the assumptions that hold wherever this one does.
    """

    name: str
    meaning: str
    example: str
    roles: tuple[tuple[str, ...], ...]
    implies: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind(
            "no-padding",
            "the attention mask is all ones",
            "one prompt at a time, or prompts of one length",
            (("mask",),),
            ("no-left-padding",),
        ),
        Kind(
            "no-left-padding",
            "each row of the attention mask is ones, then zeros (what comes out at padded positions is unspecified)",
            "prompts of several lengths, padded at the end",
            (("mask",),),
        ),
        Kind("batch=1", "the batch is 1", "a chat program", (("ids",),), ("no-batched-chunks",)),
        Kind(
            "no-batched-chunks",
            "the batch is 1, or one token comes at a time, or the cache is empty",
            "batched generation without chunked prefill",
            (("ids", "mask"), ("ids", "past")),
        ),
        Kind(
            "counted-positions",
            "position ids count up from the number of tokens in the cache (those of padding may be anything)",
            "position ids as generation makes them",
            (("positions", "mask"), ("positions", "past")),
        ),
        Kind(
            f"{MAX_LENGTH}=N",
            "past and new tokens together are at most N",
            f"{MAX_LENGTH}=2048 for a context of 2048 tokens",
            (("mask",), ("ids",)),
        ),
    )
}
"""The assumptions that exist, by name."""


def kind_of(assumption: str) -> Kind:
    """The kind of an assumption as `Assumptions` holds it.

    Raises:
        UsageError: There is none.
    """
    return KINDS[f"{MAX_LENGTH}=N" if _length(assumption) is not None else _parsed(assumption)]


def meaning(assumption: str) -> str:
    """Where an assumption holds, as a clause."""
    length = _length(assumption)
    words = kind_of(assumption).meaning
    return words if length is None else words.replace(" N", f" {length}")


@dataclasses.dataclass(frozen=True)
class Assumptions:
    """What may be taken for granted about inputs.

    Attributes:
        names: The assumptions as they were given, each once.
    """

    names: tuple[str, ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> Assumptions:
        """Assumptions from their names, such as "no-padding" or "max-length=2048".

        Raises:
            UsageError: There is no such assumption, or the length is no positive number.
        """
        if isinstance(texts, str):
            texts = [texts]
        return cls(tuple(dict.fromkeys(_parsed(text) for text in texts)))

    def holds(self, name: str) -> bool:
        """Whether `name` is assumed, or follows from what is. ("max-length=N" follows from every smaller length.)

        Raises:
            UsageError: There is no such assumption.
        """
        length = _length(name)
        if length is not None:
            return self.max_length is not None and self.max_length <= length
        kind_of(name)
        return any(given == name or name in kind_of(given).implies for given in self.names)

    @property
    def max_length(self) -> int | None:
        """The most tokens, past and new, that have to be expected; None: any number."""
        return min((n for name in self.names if (n := _length(name)) is not None), default=None)

    def __or__(self, other: Assumptions) -> Assumptions:
        return Assumptions(tuple(dict.fromkeys((*self.names, *other.names))))

    def __bool__(self) -> bool:
        return bool(self.names)


NOTHING = Assumptions()
"""Nothing is taken for granted."""


@dataclasses.dataclass(frozen=True)
class Reliance:
    """An assumption that a pass relied on.

    Attributes:
        assumption: Its name.
        inputs: The model's inputs that show whether it holds, by role (see `Kind.roles`).
        reason: What needed it, as a phrase.
        by: The name of the pass.
    """

    assumption: str
    inputs: Mapping[str, str]
    reason: str
    by: str

    def to_dict(self) -> dict[str, Any]:
        """The entry of the metadata."""
        inputs = dict(sorted(self.inputs.items()))
        return {"assumption": self.assumption, "inputs": inputs, "reason": self.reason, "pass": self.by}


def read(model: ir.Model) -> list[Reliance]:
    """What `model` takes for granted; empty where it takes every input.

    Raises:
        ModelError: The metadata isn't what graphopt writes.
    """
    return parse_metadata(model.metadata_props.get(ASSUMPTIONS_KEY))


def parse_metadata(text: str | None) -> list[Reliance]:
    """What the metadata entry says; empty where there is none.

    Raises:
        ModelError: It isn't what graphopt writes.
    """
    if text is None:
        return []
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ModelError(f"the metadata entry {ASSUMPTIONS_KEY!r} isn't valid JSON ({error}).") from error
    if not isinstance(data, list):
        raise ModelError(f"the metadata entry {ASSUMPTIONS_KEY!r} must be a JSON list.")
    return [_entry(item) for item in data]


def _entry(item: Any) -> Reliance:
    if not isinstance(item, dict) or not isinstance(item.get("inputs", {}), dict):
        raise ModelError(f"the metadata entry {ASSUMPTIONS_KEY!r} doesn't hold assumptions.")
    try:
        name = _parsed(str(item.get("assumption")))
    except UsageError as error:
        raise ModelError(f"the metadata entry {ASSUMPTIONS_KEY!r} is of another version: {error}") from error
    inputs = {str(role): str(value) for role, value in item.get("inputs", {}).items()}
    return Reliance(name, inputs, str(item.get("reason", "")), str(item.get("pass", "")))


def note(model: ir.Model, reliance: Reliance) -> bool:
    """Write into `model` that it takes something for granted; returns whether that is new.

    Raises:
        ValueError: An input that it names isn't one of the model, or the roles don't show whether it holds.
    """
    known = {value.name for value in model.graph.inputs}
    if unknown := sorted(set(reliance.inputs.values()) - known):
        raise ValueError(f"{unknown[0]!r} is no input of the model, so nothing shows whether it suits the assumption")
    roles = kind_of(reliance.assumption).roles
    if not any(set(needed) <= set(reliance.inputs) for needed in roles):
        wanted = " or ".join(" and ".join(needed) for needed in roles)
        raise ValueError(f"{reliance.assumption} needs the name of the input that is {wanted}")
    entries = read(model)
    same = [e for e in entries if (e.assumption, e.inputs, e.by) == (reliance.assumption, reliance.inputs, reliance.by)]
    if same:
        return False
    entries.append(reliance)
    entries.sort(key=lambda e: (e.assumption, e.by, sorted(e.inputs.items())))
    model.metadata_props[ASSUMPTIONS_KEY] = json.dumps([e.to_dict() for e in entries], sort_keys=True)
    return True


def carried(model: ir.Model) -> Assumptions:
    """What `model` already takes for granted, so that it holds for whatever is done to it next."""
    return Assumptions(tuple(dict.fromkeys(entry.assumption for entry in read(model))))


def listed(relied: Iterable[Reliance]) -> list[dict[str, Any]]:
    """What a model takes for granted, as JSON data for a report: one entry for each assumption and pass."""
    return [{**entry.to_dict(), "meaning": meaning(entry.assumption)} for entry in relied]


def unneeded(given: Assumptions, relied: Iterable[Reliance]) -> list[str]:
    """What was assumed without need, a phrase each: "batch=1", or "no-padding (no-left-padding was enough)"."""
    used = list(dict.fromkeys(entry.assumption for entry in relied))
    phrases = []
    for name in given.names:
        if name in used:
            continue
        enough = [u for u in used if Assumptions((name,)).holds(u)]
        phrases.append(f"{name} ({' and '.join(enough)} was enough)" if enough else name)
    return phrases


# ---- whether inputs suit


def violation(reliance: Reliance, feeds: Mapping[str, Any]) -> str | None:
    """What in `feeds` (arrays or OrtValues by input name) goes against an assumption, as a clause; None: nothing that
    can be seen on the host."""
    name, inputs = reliance.assumption, reliance.inputs
    if name in ("no-padding", "no-left-padding"):
        mask = _numbers(feeds.get(inputs["mask"]))
        return None if mask is None else _padding(name, inputs["mask"], mask)
    if name == "counted-positions":
        return _counting(inputs, feeds)
    batch = _size(feeds, inputs, "ids", 0)
    if name == "batch=1":
        return None if batch in (None, 1) else f"the batch of {inputs['ids']!r} is {batch}"
    if name == "no-batched-chunks" and batch in (None, 1):
        return None
    new, total = _size(feeds, inputs, "ids", 1), _size(feeds, inputs, "mask", -1)
    # The mask goes first: the length of a cache may be that of its buffer.
    past = _size(feeds, inputs, "past", 2) if total is None or new is None else max(0, total - new)
    if name == "no-batched-chunks":
        if new in (None, 1) or past in (None, 0):
            return None
        return f"{new} tokens come for each of {batch} rows of {inputs['ids']!r} after {past} in the cache"
    limit = _length(name)
    if total is None and new is not None:
        total = new + (past or 0)
    if limit is None or total is None or total <= limit:
        return None
    return f"past and new tokens together are {total}"


def outside(relied: Iterable[Reliance], feeds: Mapping[str, Any]) -> tuple[Reliance, str] | None:
    """The first assumption that inputs don't suit, with what is wrong; None where they suit all."""
    for entry in relied:
        if (found := violation(entry, feeds)) is not None:
            return entry, found
    return None


def _padding(assumption: str, name: str, mask: np.ndarray[Any, Any]) -> str | None:
    if mask.all():  # the usual case, and the quickest
        return None
    if assumption == "no-padding":
        return f"{name!r} holds zeros"
    if mask.ndim == 0:
        return None
    ones = mask.astype(np.bool_)
    rises = np.greater(ones[..., 1:], ones[..., :-1])
    if not rises.any():
        return None
    row = np.argwhere(rises)[0]
    where = f"row {row[0]} of {name!r}" if len(row) > 1 else repr(name)
    return f"{where} has a 0 at {row[-1]} before a 1"


def _numbers(value: Any) -> np.ndarray[Any, Any] | None:
    """The numbers of an array, a list or an OrtValue on the host; None where they lie on a device."""
    if value is None or isinstance(value, np.ndarray):
        return value
    if hasattr(value, "device_name"):
        return np.asarray(value.numpy()) if value.device_name() == "cpu" else None
    return np.asarray(value)


def _counting(inputs: Mapping[str, str], feeds: Mapping[str, Any]) -> str | None:
    positions = _numbers(feeds.get(inputs["positions"]))
    if positions is None or positions.ndim == 0:
        return None
    new, total = positions.shape[-1], _size(feeds, inputs, "mask", -1)
    past = _size(feeds, inputs, "past", 2) if total is None else total - new
    if past is None:
        return None
    wrong = positions != np.arange(past, past + new)
    if not wrong.any():  # the usual case
        return None
    if total is not None:  # positions of padding don't count, but where it is can't be seen on a device
        mask = _numbers(feeds.get(inputs["mask"]))
        wrong = wrong & (mask[..., -new:] != 0) if mask is not None else np.zeros(1, np.bool_)
    if not wrong.any():
        return None
    at = np.argwhere(wrong)[0]
    found = np.broadcast_to(positions, wrong.shape)[tuple(at)]
    where = f"row {at[-2]} of {inputs['positions']!r}" if len(at) > 1 else repr(inputs["positions"])
    return f"{where} has {found} where {past + at[-1]} is the count of tokens before"


def _size(feeds: Mapping[str, Any], inputs: Mapping[str, str], role: str, axis: int) -> int | None:
    """One size of the input of a role; None where it isn't fed or has no such axis."""
    value = feeds.get(inputs.get(role, ""))
    if value is None:
        return None
    shape = getattr(value, "shape", None)
    if callable(shape):
        shape = shape()
    elif shape is None:
        shape = np.shape(value)
    return int(shape[axis]) if -len(shape) <= axis < len(shape) else None


# ---- names


_LENGTH = re.compile(rf"^{MAX_LENGTH}=([1-9][0-9]*)$")


@functools.cache
def _length(name: str) -> int | None:
    found = _LENGTH.match(name)
    return None if found is None else int(found[1])


def _parsed(text: str) -> str:
    name = str(text).strip().lower().replace("_", "-")
    if name in KINDS:
        return name
    if (length := _length(name)) is not None:
        return f"{MAX_LENGTH}={length}"
    if name.partition("=")[0] == MAX_LENGTH:
        raise UsageError(f"The assumption {MAX_LENGTH} takes a positive whole number, as in {MAX_LENGTH}=2048.")
    near = difflib.get_close_matches(name, KINDS, n=1)
    hint = f"did you mean {near[0]}? There" if near else "there"
    raise UsageError(f"There is no assumption {text!r}; {hint} are {', '.join(KINDS)}.")
