"""What may be taken for granted about inputs: names, implications, metadata, and whether inputs suit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from graphopt.errors import ModelError, UsageError
from graphopt.graph.assumptions import (
    ASSUMPTIONS_KEY,
    KINDS,
    Assumptions,
    Reliance,
    carried,
    kind_of,
    meaning,
    note,
    outside,
    read,
    unneeded,
    violation,
)

MASK = {"mask": "attention_mask"}
NEW = {"ids": "input_ids"}
CACHED = {"ids": "input_ids", "past": "past_key_values.0.key"}


def model(text: str | None = None) -> ir.Model:
    names = ("input_ids", "attention_mask", "position_ids", "past_key_values.0.key")
    made = ir.Model(ir.Graph([ir.val(n) for n in names], [], nodes=[], opset_imports={"": 23}, name="g"), ir_version=10)
    if text is not None:
        made.metadata_props[ASSUMPTIONS_KEY] = text
    return made


# ---- names


def test_what_follows_from_what() -> None:
    every = ("no-padding", "no-left-padding", "batch=1", "no-batched-chunks", "counted-positions", "max-length=7")
    held = {name: [other for other in every if Assumptions.parse([name]).holds(other)] for name in every}
    assert held == {
        "no-padding": ["no-padding", "no-left-padding"],
        "no-left-padding": ["no-left-padding"],
        "batch=1": ["batch=1", "no-batched-chunks"],
        "no-batched-chunks": ["no-batched-chunks"],
        "counted-positions": ["counted-positions"],
        "max-length=7": ["max-length=7"],
    }
    assert not any(Assumptions().holds(name) for name in every)


def test_a_length_holds_for_every_longer_one() -> None:
    found = Assumptions.parse(["max-length=100", "max-length=20"])
    assert found.max_length == 20
    assert found.holds("max-length=20")
    assert found.holds("max-length=64")
    assert not found.holds("max-length=19")
    assert Assumptions.parse(["batch=1"]).max_length is None


def test_names_are_read_leniently_and_once() -> None:
    assert Assumptions.parse([" No_Left_Padding", "no-left-padding", "MAX_LENGTH=8"]).names == (
        "no-left-padding",
        "max-length=8",
    )
    assert Assumptions.parse("batch=1") == Assumptions(("batch=1",))
    both = Assumptions.parse(["batch=1"]) | Assumptions.parse(["no-padding", "batch=1"])
    assert both.names == ("batch=1", "no-padding")
    assert both
    assert not Assumptions()


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("no-leftpadding", "did you mean no-left-padding?"),
        ("batch=2", "did you mean batch=1?"),
        (
            "quick",
            "no assumption 'quick'; there are no-padding, no-left-padding, batch=1, no-batched-chunks, counted-p",
        ),
        ("max-length", "as in max-length=2048"),
        ("max-length=0", "as in max-length=2048"),
        ("max-length=N", "as in max-length=2048"),
    ],
)
def test_unknown_names(name: str, told: str) -> None:
    with pytest.raises(UsageError, match=told.replace("?", r"\?")):
        Assumptions.parse([name])
    with pytest.raises(UsageError):
        Assumptions.parse(["max-length=3"]).holds(name)


def test_every_kind_says_what_it_is() -> None:
    for name, kind in KINDS.items():
        one = name.replace("N", "2048")
        assert kind_of(one) is kind
        assert kind.meaning
        assert kind.example
        assert kind.roles
    assert meaning("max-length=2048") == "past and new tokens together are at most 2048"


def test_the_guide_has_them_all() -> None:
    guide = (
        (Path(__file__).parents[2] / "docs" / "user-guide.md").read_text().partition("## What the result assumes")[2]
    )
    guide = guide.partition("## ")[0]
    rows = re.findall(r"^\| `([\w=-]+)` \| (.*?) \|", guide, re.MULTILINE)
    assert [name for name, _ in rows] == list(KINDS)
    for name, words in rows:
        assert KINDS[name].meaning.split(" (")[0].replace("attention mask", "mask") in words.replace(
            "attention mask", "mask"
        )


# ---- metadata


def test_relied_on_twice_is_noted_once_and_every_pass_by_itself() -> None:
    made = model()
    assert note(made, Reliance("no-left-padding", MASK, "the kernel counts tokens", "b"))
    assert not note(made, Reliance("no-left-padding", MASK, "another site", "b"))
    assert note(made, Reliance("no-left-padding", MASK, "as above", "a"))
    assert note(made, Reliance("batch=1", NEW, "one row", "b"))
    assert json.loads(made.metadata_props[ASSUMPTIONS_KEY]) == [
        {"assumption": "batch=1", "inputs": NEW, "reason": "one row", "pass": "b"},
        {"assumption": "no-left-padding", "inputs": MASK, "reason": "as above", "pass": "a"},
        {"assumption": "no-left-padding", "inputs": MASK, "reason": "the kernel counts tokens", "pass": "b"},
    ]
    assert [e.by for e in read(made)] == ["b", "a", "b"]
    assert carried(made).names == ("batch=1", "no-left-padding")
    assert read(made.clone()) == read(made)


def test_what_was_given_without_need() -> None:
    relied = [Reliance("no-left-padding", MASK, "", "a"), Reliance("batch=1", NEW, "", "a")]
    found = unneeded(Assumptions.parse(["no-padding", "batch=1", "max-length=9"]), relied)
    assert found == ["no-padding (no-left-padding was enough)", "max-length=9"]
    assert unneeded(Assumptions.parse(["no-left-padding"]), relied) == []


def test_what_can_not_be_checked_is_refused() -> None:
    with pytest.raises(ValueError, match="'mask' is no input"):
        note(model(), Reliance("no-padding", {"mask": "mask"}, "", "a"))
    with pytest.raises(ValueError, match="needs the name of the input that is ids and mask or ids and past"):
        note(model(), Reliance("no-batched-chunks", NEW, "", "a"))
    with pytest.raises(ValueError, match="mask or ids"):
        note(model(), Reliance("max-length=5", {}, "", "a"))


@pytest.mark.parametrize(
    "text", ["", "{", "{}", "3", "[3]", '[{"assumption": "batch=1", "inputs": []}]', '[{"assumption": "new-one"}]']
)
def test_metadata_of_another_form(text: str) -> None:
    with pytest.raises(ModelError, match=ASSUMPTIONS_KEY):
        read(model(text))


def test_no_metadata_is_no_assumption() -> None:
    assert read(model()) == []
    assert not carried(model())


# ---- inputs


def shaped(batch: int, new: int, past: int) -> dict[str, Any]:
    return {
        "input_ids": np.zeros((batch, new), np.int64),
        "attention_mask": np.ones((batch, past + new), np.int64),
        "past_key_values.0.key": np.zeros((batch, 2, past, 4), np.float32),
    }


def said(assumption: str, inputs: dict[str, str], feeds: dict[str, Any]) -> str | None:
    return violation(Reliance(assumption, inputs, "", "a"), feeds)


@pytest.mark.parametrize("convert", [np.int64, np.int32, np.bool_, np.float32])
def test_padding(convert: Callable[[Any], Any]) -> None:
    def both(*rows: list[int]) -> tuple[str | None, str | None]:
        feeds = {"attention_mask": convert(rows)}
        return said("no-padding", MASK, feeds), said("no-left-padding", MASK, feeds)

    assert both([1, 1, 1], [1, 1, 1]) == (None, None)
    assert both([1, 1, 1], [1, 0, 0]) == ("'attention_mask' holds zeros", None)
    assert both([0, 0, 0]) == ("'attention_mask' holds zeros", None)
    assert both([1, 1, 1], [0, 0, 1])[1] == "row 1 of 'attention_mask' has a 0 at 1 before a 1"
    assert both([1, 0, 1])[1] == "row 0 of 'attention_mask' has a 0 at 1 before a 1"


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(arrays.arrays(np.int64, st.tuples(st.integers(1, 4), st.integers(1, 9)), elements=st.integers(0, 1)))
def test_no_left_padding_is_what_a_count_of_ones_says(mask: np.ndarray[Any, Any]) -> None:
    counted = (np.arange(mask.shape[1]) < mask.sum(1)[:, None]).astype(np.int64)
    assert (said("no-left-padding", MASK, {"attention_mask": mask}) is None) == np.array_equal(mask, counted)


@pytest.mark.parametrize(
    ("sizes", "fails"),
    [
        ((1, 5, 0), []),
        ((1, 4, 7), ["max-length=10"]),
        ((3, 1, 7), ["batch=1"]),
        ((3, 5, 0), ["batch=1"]),
        ((3, 4, 7), ["batch=1", "no-batched-chunks", "max-length=10"]),
    ],
)
def test_shapes(sizes: tuple[int, int, int], fails: list[str]) -> None:
    feeds = shaped(*sizes)
    for chunk in (CACHED, NEW | MASK, CACHED | MASK):
        roles = {"batch=1": NEW, "no-batched-chunks": chunk, "max-length=10": chunk}
        assert [name for name, inputs in roles.items() if said(name, inputs, feeds)] == fails
    assert bool(said("max-length=10", MASK, feeds)) == ("max-length=10" in fails)


def test_the_mask_tells_how_much_of_a_buffer_is_used() -> None:
    feeds = shaped(3, 4, 0) | {"past_key_values.0.key": np.zeros((3, 2, 512, 4), np.float32)}
    for name in ("no-batched-chunks", "max-length=10"):
        assert said(name, CACHED | MASK, feeds) is None
        assert said(name, CACHED, feeds) is not None


@pytest.mark.parametrize(
    ("positions", "mask", "told"),
    [
        ([[2, 3, 4]], [[1] * 5], None),
        ([2, 3, 4], [[1] * 5] * 2, None),
        ([[2, 3, 4], [2, 3, 1]], [[1] * 5, [1, 1, 1, 1, 0]], None),
        ([[2, 3, 4], [2, 3, 1]], [[1] * 5] * 2, "row 1 of 'position_ids' has 1 where 4 is the count of tokens before"),
        ([[0, 1, 2]], [[1] * 5], "row 0 of 'position_ids' has 0 where 2 is the count of tokens before"),
        ([[2, 3, 4], [0, 1, 2]], [[1] * 5, [0, 0, 1, 1, 1]], "row 1 of 'position_ids' has 0 where 2 is"),
    ],
)
def test_positions(positions: list[Any], mask: list[list[int]], told: str | None) -> None:
    feeds = shaped(len(mask), 3, 2) | {"position_ids": np.array(positions), "attention_mask": np.array(mask)}
    roles = {"positions": "position_ids"}
    found = said("counted-positions", roles | MASK, feeds)
    assert found is None if told is None else (found or "").startswith(told)
    without = said("counted-positions", {**roles, "past": "past_key_values.0.key"}, feeds)
    if np.all(np.array(mask)):
        assert without == found
    del feeds["attention_mask"], feeds["past_key_values.0.key"]
    assert said("counted-positions", roles | MASK, feeds) is None


def test_words() -> None:
    feeds = shaped(3, 4, 7)
    assert said("batch=1", NEW, feeds) == "the batch of 'input_ids' is 3"
    assert (
        said("no-batched-chunks", CACHED, feeds)
        == "4 tokens come for each of 3 rows of 'input_ids' after 7 in the cache"
    )
    assert said("max-length=10", MASK, feeds) == "past and new tokens together are 11"
    entries = [Reliance("max-length=20", MASK, "", "a"), Reliance("batch=1", NEW, "", "a")]
    assert outside(entries, feeds) == (entries[1], "the batch of 'input_ids' is 3")
    assert outside(entries[:1], feeds) is None


def test_what_is_not_fed_is_not_judged() -> None:
    roles = {"no-padding": MASK, "batch=1": NEW, "no-batched-chunks": CACHED, "max-length=1": CACHED}
    assert not any(said(name, inputs, {}) for name, inputs in roles.items())


def test_lists_and_ort_values_are_judged_too() -> None:
    ort = pytest.importorskip("onnxruntime")
    feeds = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in shaped(3, 4, 7).items()}
    assert said("batch=1", NEW, feeds) == "the batch of 'input_ids' is 3"
    assert said("no-padding", MASK, feeds) is None
    assert said("no-left-padding", MASK, {"attention_mask": [[0, 1]]}) is not None
    assert said("batch=1", NEW, {"input_ids": [[1], [2]]}) is not None
