"""What a model asks of its session, in its metadata."""

from __future__ import annotations

import json

import onnx_ir as ir
import pytest

from graphopt.errors import ModelError
from graphopt.graph.session_settings import SETTINGS_KEY, SessionSettings, read, request


def model(text: str | None = None) -> ir.Model:
    made = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}), ir_version=10)
    if text is not None:
        made.metadata_props[SETTINGS_KEY] = text
    return made


def test_nothing_asked() -> None:
    assert read(model()) == SessionSettings()
    assert read(model()).listed() == []


def test_asked_twice_is_asked_once() -> None:
    made = model()
    assert request(made, "session.dynamic_block_base", "4", "steadier")
    assert not request(made, "session.dynamic_block_base", "4", "steadier")
    assert request(made, "disabled_optimizers", "SkipLayerNormFusion", "slower here")
    assert not request(made, "disabled_optimizers", "SkipLayerNormFusion", "slower here")
    assert request(made, "disabled_optimizers", "AttentionFusion", "slower too")
    assert read(made).listed() == [
        ("session.dynamic_block_base", "4", "steadier"),
        ("disabled_optimizers", "AttentionFusion, SkipLayerNormFusion", "slower too; slower here"),
    ]


def test_the_order_of_asking_makes_no_difference() -> None:
    texts = set()
    for names in (("A", "B"), ("B", "A")):
        made = model()
        for name in names:
            request(made, "disabled_optimizers", name, name)
        texts.add(made.metadata_props[SETTINGS_KEY])
    assert len(texts) == 1


def test_without_reasons_as_other_tools_may_write_it() -> None:
    text = json.dumps({"config": {"session.x": 1}, "disabled_optimizers": ["A"]})
    assert read(model(text)).listed() == [("session.x", "1", ""), ("disabled_optimizers", "A", "")]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"config": []}', '{"config": 3}', '{"disabled_optimizers": {"a": 1}}']
)
def test_metadata_of_another_form(text: str) -> None:
    if text == '{"config": []}':  # empty is nothing
        assert read(model(text)) == SessionSettings()
        return
    with pytest.raises(ModelError, match=r"graphopt\.session"):
        read(model(text))
