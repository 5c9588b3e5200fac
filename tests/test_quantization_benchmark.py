"""The benchmark of quantization (benchmarks/quantization.py): its rows, recipes, tables and page; nothing is measured."""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import quantization
import quantization_decoder
import quantization_memory
import quantization_models
from quantization_decoder import Kept, Row, line, plot
from quantization_peers import PEERS
from quantization_variants import FLOAT, METHODS, SETTINGS, Setting, recipe_of, run, variants

from graphopt.errors import GraphoptError, UsageError


def test_rows() -> None:
    found = variants([])
    names = [v.name for v in (*found, *PEERS)]
    assert len(names) == len(set(names))
    for setting in SETTINGS:
        assert f"rtn, {setting}" in names
        assert f"auto, {setting}" in names
    assert {v.method for v in found} == {method.recipe for method in METHODS}
    assert [v.name for v in variants(["rtn"])] == [f"rtn, {setting}" for setting in SETTINGS]
    assert [v.name for v in variants(["gptq, 3 bits, group 32"])] == ["gptq, 3 bits, group 32"]
    assert {v.section for v in found} <= {*map(str, SETTINGS), quantization_decoder.ACTIVATIONS}


def test_a_recipe_with_bits_and_groups() -> None:
    recipe = recipe_of("rtn", Setting(3, 64), {"symmetric": False})
    (step,) = [step for step in recipe.steps if step.name == "quantize-weights"]
    assert step.options == {"bits": 3, "group_size": 64, "symmetric": False}
    assert recipe.passes()
    with pytest.raises(UsageError, match="has the option 'bits'"):
        recipe_of("kv4", Setting(3, 64))
    with pytest.raises(UsageError, match="There is no recipe"):
        recipe_of("no-such-method", Setting(4, 32))


@pytest.mark.parametrize("method", [method.recipe for method in METHODS])
def test_recipes_that_ship_take_their_settings(method: str) -> None:
    try:
        recipe_of(method)
    except UsageError as error:
        pytest.skip(str(error))
    for variant in variants([method]):
        recipe_of(method, variant.setting).passes()


def test_a_worker() -> None:
    found = run([sys.executable, "-c", "print('begun'); print('{\"left\": {\"a\": 1}}')"], 1)
    assert found["left"] == {"a": 1}
    assert found["seconds"] > 0
    with pytest.raises(GraphoptError, match="it broke"):
        run([sys.executable, "-c", "import sys; print('x'); print('it broke', file=sys.stderr); sys.exit(3)"], 1)


def test_a_line() -> None:
    base = Row("float", perplexity=18.0)
    rtn = Row("data-free", "4 bits, group 32", 100_000_000, 26.0, 0.4, 0.8)
    row = Row(
        "calibrated", "4 bits, group 32", 90_000_000, 20.0, 0.1, 0.9, (1.25, 0.01), (0.5, 0.01), 12.0, 700_000_000
    )
    cells = [cell.strip() for cell in line("gptq, 4 bits, group 32", row, base, rtn, {"prefill": 1000.0, "decode": 60.0}, 60e9)
             .strip("| ").split(" | ")]  # fmt: skip
    assert cells == ["gptq", "90.0", "20.00", "75%", "0.1000", "90.0%", "800 ± 6", "120 ± 2", "18%", "12, 700"]
    # What wasn't measured is empty.
    assert line("x", Row("peer", "s", 1), base, None, {}, float("nan")).count("|  ") == 8


def test_rows_are_kept(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "a" / "rows.json", False, {"windows": 16})
    kept.rows["x"] = Row("peer", "s", 3, 1.0, 2.0, 0.5, (1.0, 0.1), None, missing="no")
    kept.rates["decode"] = 5.0
    kept.write()
    again = Kept(kept.file, True, {"windows": 16})
    assert again.rates == kept.rates
    assert vars(again.rows["x"]) == {**vars(kept.rows["x"]), "prefill": [1.0, 0.1]}
    assert not Kept(kept.file, False, {"windows": 4}).rows
    with pytest.raises(UsageError, match=r"was measured with .*16.*, not with .*4"):
        Kept(kept.file, True, {"windows": 4})


def test_page(tmp_path: Path) -> None:
    page = tmp_path / "quantization.md"
    rows = {
        FLOAT: Row("float", bytes=540_000_000, perplexity=18.0),
        "a, b": Row("data-free", "s", 1, 2.0, 0.3),
        "broken": Row("calibrated", "s", 2, float("inf"), float("nan")),
    }
    for _ in range(2):
        quantization.write(page, "decoder", "first", plot(rows))
        quantization.write(page, "memory", "third", None)
    text = page.read_text()
    assert text.count("first") == text.count("third") == 1
    assert text.index("first") < text.index("third")
    titles = [title.text for title in ET.parse(tmp_path / "quantization.svg").iter("{http://www.w3.org/2000/svg}title")]
    assert [title for title in titles if title and title.startswith("a, b")]
    assert plot({FLOAT: rows[FLOAT]}) is None


def test_parts_have_models() -> None:
    names = [case.name for case in quantization_models.CASES]
    assert len(names) == len(set(names)) == 7
    assert set(quantization_memory.LIMITS) <= {method.recipe for method in METHODS}


def test_feeds_are_kept(tmp_path: Path) -> None:
    import numpy as np
    from quantization_make import read_feeds

    feeds = [{"a/b:0": np.arange(3)}, {"a/b:0": np.arange(5)}]
    folder = quantization_models.save_feeds(feeds, tmp_path / "feeds")
    found = [read_feeds(file) for file in sorted(folder.iterdir())]
    assert [list(one) for one in found] == [["a/b:0"]] * 2
    np.testing.assert_array_equal(found[1]["a/b:0"], np.arange(5))
