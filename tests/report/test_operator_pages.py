"""The pages of operators: what they are made of, and that those of this package are complete."""

from __future__ import annotations

import pytest

from graphopt.report import operator_pages
from graphopt.runtime_ops import operators


def test_a_page_has_all_parts() -> None:
    text = operator_pages.page(operators()["HadamardTransform"])
    assert "# HadamardTransform\n" in text
    assert "**Each group of features times an orthogonal Hadamard matrix" in text
    assert "| `ai.graphopt`, version 1 | `float`, `float16` | CPU" in text
    assert "| `factor` | `float` | `[m, m]` | The factor F |" in text
    assert "| `group_size` | `int` | required | Features of a group, 2^k · m |" in text
    assert "consists of Add, Cast, " in text


@pytest.mark.parametrize("name", operators())
def test_every_operator_is_documented(name: str) -> None:
    operator = operators()[name]
    assert operator.summary.endswith(".")
    assert operator.description.strip()
    for parameter in (*operator.inputs, *operator.outputs, *operator.attributes):
        assert parameter.meaning, f"{name} doesn't say what {parameter.name} is"


def test_the_index_lists_all() -> None:
    text = operator_pages.pages()["README.md"]
    for name, operator in operators().items():
        assert f"| [{name}]({name}.md) | {operator.summary} |" in text
