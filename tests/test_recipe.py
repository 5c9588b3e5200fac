"""Recipes: files, names, and one sentence for each mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from graphopt.errors import UsageError
from graphopt.passes import registry
from graphopt.passes.quantize.quantize_weights import QuantizeWeights
from graphopt.recipe import Step, load, shipped


def test_shipped_recipes_can_be_made() -> None:
    assert {"exact", "clean"} <= set(shipped())
    for name in shipped():
        recipe = load(name)
        assert recipe.passes()
        assert recipe.description


def test_file_with_options(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "# mine\npasses:\n  - eliminate-dead-code\n  - fold-constants: {max-bytes: 5}\n  - fold-constants:\n"
    )
    recipe = load(file)
    assert recipe.description == "mine"
    assert recipe.to_data() == {
        "passes": ["eliminate-dead-code", {"fold-constants": {"max-bytes": 5}}, "fold-constants"]
    }
    assert recipe.passes()[1].max_bytes == 5


def test_passes_of_other_packages() -> None:
    made = load({"passes": ["onnx_ir.passes.common:TopologicalSortPass"]}).passes()
    assert type(made[0]).__name__ == "TopologicalSortPass"


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({}, "no list `passes:`"),
        ({"passes": "all"}, "no list `passes:`"),
        ({"passes": [], "other": 1}, "unknown key 'other'"),
        ({"passes": []}, "is empty"),
        ({"passes": ["fold-constants"], 3: 4, "a": 5}, "unknown key"),
        ({"passes": [{"fold-constants": 0}]}, "Entry 1"),
        ({"passes": [{"fold-constants": {1: 2}}]}, "Entry 1"),
        ({"passes": [{"fold-constants": {"max_bytes": "lots"}}]}, "must be int, not 'lots'"),
        ({"passes": [{"fold-constants": {"max_bytes": 4.5}}]}, "must be int, not 4.5"),
        ({"passes": [{"fold-constants": {"max_bytes": True}}]}, "must be int, not True"),
        ({"passes": [{"raise-silu": {"operator": 1}}]}, "must be bool, not 1"),
        (["fold-constants"], "must be a name, a file or a mapping"),
        ({"passes": [1]}, "Entry 1"),
        ({"passes": [{"a": 1, "b": 2}]}, "Entry 1"),
        ({"passes": [{"fold-constants": 3}]}, "Entry 1"),
        ({"passes": ["fold-constant"]}, "did you mean fold-constants"),
        ({"passes": [{"fold-constants": {"size": 3}}]}, "no option 'size'; it has max_bytes"),
        ({"passes": [{"lift-constants": {"size": 3}}]}, "no option 'size'; it has none"),
        ({"passes": ["os:getcwd"]}, "not an onnx_ir pass"),
        ({"passes": ["nowhere.at_all:Thing"]}, "can't be loaded"),
    ],
)
def test_mistakes(data: object, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        load(data).passes()


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="can't be read"):
        load(tmp_path / "none.yaml")
    with pytest.raises(UsageError, match="did you mean exact"):
        load("exacty")
    (tmp_path / "bad.yaml").write_text("passes: [")
    with pytest.raises(UsageError, match="not valid YAML"):
        load(tmp_path / "bad.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"passes:\n  - \xff\xfe")
    with pytest.raises(UsageError, match="isn't text in UTF-8"):
        load(tmp_path / "bytes.yaml")


def test_every_pass_is_described() -> None:
    for name, cls in registry.builtin().items():
        assert cls.family, name
        assert cls.__doc__, name
        assert "When not to use it" in cls.__doc__, name


def test_a_recipe_in_another(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("passes:\n  - recipe: canonical\n  - quantize-kv: {key_bits: 4}\nassume: [batch=1]\n")
    recipe = load(file)
    assert recipe.steps == (*load("canonical").steps, Step("quantize-kv", {"key_bits": 4}))
    assert load("exact").steps == (*load("canonical").steps, *load("lower").steps)
    file.write_text(f"passes:\n  - recipe: {file}\n")
    with pytest.raises(UsageError, match="must name another recipe"):
        load(str(file))
    other = tmp_path / "other.yaml"
    other.write_text(f"passes:\n  - recipe: {file}\n")
    file.write_text(f"passes:\n  - recipe: {other}\n")
    with pytest.raises(UsageError, match="leads back to itself"):
        load(str(file))


def test_joined_recipes_share_the_exact_ones() -> None:
    first, last, decode = (load(name).steps for name in ("canonical", "lower", "decode"))
    joined = load("rtn+kv8+decode")
    between = (*load("rtn").steps[len(first) : -len(last)], *load("kv8").steps[len(first) : -len(last)])
    assert joined.steps == (*first, *between, *last, *decode)
    assert "no-left-padding" in joined.assume.names
    assert load("decode+exact").steps == (*decode, *first, *last)


def test_bits_behind_the_name() -> None:
    assert load("awq3").steps == load("awq").with_options(["bits=3"]).steps
    assert {k: v for s in load("kv4+awq3").steps for k, v in s.options.items() if k == "bits"} == {"bits": 3}
    assert load("gptq2").name == "gptq2"  # one of its own comes first
    assert load("gptq2").steps != load("gptq").with_options(["bits=2"]).steps
    for name in ("exact4", "awq9", "decode4", "auto4"):  # no such bits, or none at all
        with pytest.raises(UsageError, match=f"There is no recipe '{name}'"):
            load(name)


def test_what_a_recipe_is_for_must_be_for_the_target() -> None:
    for name, pass_ in (
        ("int8-dynamic", "quantize-dynamic"),
        ("int8-static", "quantize-static"),
        ("auto", "allocate-bits"),
    ):
        assert load(name).passes("cpu")
        with pytest.raises(
            UsageError, match=f"The pass '{pass_}' of the recipe {name} is for the target cpu.*portable"
        ):
            load(name).passes("portable")
    (quantizer,) = [p for p in load("rtn").passes("portable") if isinstance(p, QuantizeWeights)]
    assert quantizer.operator == "standard"
    given = load("rtn").with_options(["quantize-weights.operator=contrib"]).passes("portable")
    assert [p.operator for p in given if isinstance(p, QuantizeWeights)] == ["contrib"]


def test_options_of_a_recipe() -> None:
    recipe = load("rtn").with_options(["bits=3", "quantize-weights.exclude=[down]"])
    (step,) = [step for step in recipe.steps if step.name == "quantize-weights"]
    assert step.options == {"symmetric": False, "bits": 3, "exclude": ["down"]}
    for text, why in [
        ("bits", "sets no option"),
        ("colour=red", "no pass of the recipe rtn has such an option"),
        ("gelu.bits=3", "'gelu' of the recipe rtn has no such option, or is not in it"),
        ("bits=[", "can't be read"),
    ]:
        with pytest.raises(UsageError, match=re.escape(why)):
            load("rtn").with_options([text])
    with pytest.raises(UsageError, match="weights have 2 to 8 bits, not 9"):
        load("rtn").with_options(["bits=9"]).passes()
