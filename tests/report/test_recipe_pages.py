"""Pages of recipes: the comment of the file as text, and rows found by the recipe's name."""

from __future__ import annotations

from pathlib import Path

from graphopt.recipe import load, opening_comment, shipped
from graphopt.report.recipe_pages import contents, measured_tables, page, pages

MEASURED = """# Title

## Part

<!-- decoder -->
Measured on a day.

One model.

**4 bits**

| method | MB |
|---|---|
| rtn | 1 |
| rotate+rtn | 2 |

**3 bits** (counts: less than 4)

| method | MB |
|---|---|
| rtn, group 32 | 3 |
| nf4 | 4 |

Noise: some.
<!-- end of decoder -->

```sh
command
```

About the next.

| | cache |
|---|---|
| kv8 | 8 bits |

About the last.

| | time |
|---|---|
| kv8 | 1.0 |
"""
TEXT = "# What it does,\n# in short.\n#\n# ## Formula\n#\n#     x\npasses:\n  - eliminate-dead-code\n"


def test_tables_know_what_they_are_about() -> None:
    found = list(measured_tables(MEASURED))
    assert [(t.about, t.caption) for t in found] == [
        ("Measured on a day. One model.", "4 bits"),
        ("Measured on a day. One model.", "3 bits"),
        ("About the next.", ""),
        ("About the last.", ""),
    ]
    assert found[0].head == ("method", "MB")
    assert found[0].rows == (("rtn", "1"), ("rotate+rtn", "2"))


def test_rows_carry_the_name_of_the_recipe() -> None:
    measured = {"quantization.md": tuple(measured_tables(MEASURED))}
    text = page("rtn", TEXT, measured)
    assert "| 4 bits | rtn | 1 |\n| 4 bits | rotate+rtn | 2 |\n| 3 bits | rtn, group 32 | 3 |" in text
    assert text.count("Measured on a day. One model.") == 1
    assert "nf4" not in text
    assert "| kv8 | 8 bits |" in page("kv8", TEXT, measured)
    assert "About the last." in page("kv8", TEXT, measured)


def test_what_has_no_row_says_how_to_get_one() -> None:
    for name, command in (
        ("comq", "quantization.py --resume --only comq"),
        ("rotate", "--only rotate+gptq"),
        ("int8-static", "--parts models"),
        ("kv4", "quantize_kv.py"),
    ):
        text = page(name, TEXT, {})
        assert "Not measured yet" in text
        assert command in text


def test_the_comment_is_the_text() -> None:
    assert opening_comment(TEXT) == "What it does,\nin short.\n\n## Formula\n\n    x"
    text = page("mine", TEXT, {})
    assert "**What it does, in short.**\n\n## Formula\n\n    x\n\n## Measured" in text
    assert "```yaml\npasses:\n  - eliminate-dead-code\n```" in text
    assert "\n" not in load("gptq").description
    assert "##" not in load("gptq").description


def test_every_recipe_is_listed_and_a_missing_page_of_measurements_is_no_error(tmp_path: Path) -> None:
    assert set(pages(tmp_path)) == {f"{name}.md" for name in shipped()}
    assert all(f"(recipes/{name}.md)" in contents()["recipes.md"] for name in shipped())
    assert "## Others" not in contents()["recipes.md"]
