"""The documentation is true: its example runs, its commands exist, its links lead somewhere, its pages are up to date."""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), *(p for f in ("passes", "operators", "recipes") for p in DOCS.glob(f"{f}/*.md"))])
EXAMPLE = "graphopt.passes.clean.merge_transposes"


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> tuple[types.ModuleType, types.ModuleType]:
    """The pass of docs/write-a-pass.md and its tests, as modules."""
    pass_code, test_code = blocks(DOCS / "write-a-pass.md", "python")
    module, tests = types.ModuleType(EXAMPLE), types.ModuleType("test_merge_transposes")
    monkeypatch.setitem(sys.modules, EXAMPLE, module)
    exec(compile(pass_code, "merge_transposes.py", "exec"), module.__dict__)
    exec(compile(test_code, "test_merge_transposes.py", "exec"), tests.__dict__)
    return module, tests


def test_the_example_pass_holds_its_tests(example: tuple[types.ModuleType, types.ModuleType]) -> None:
    found = {name: f for name, f in vars(example[1]).items() if name.startswith("test_")}
    assert len(found) == 5
    for run in found.values():
        run()


def test_the_example_has_a_page(example: tuple[types.ModuleType, types.ModuleType]) -> None:
    from graphopt.report.pages import page

    text = page(example[0].MergeTransposes)
    assert "**Two transposes in a row as one.**" in text
    assert (
        "| `keep_single` | `bool` | `false` | leave a pair alone where one transpose would remain (boolean) |" in text
    )
    assert "**Options:**" not in text


def test_the_example_runs_in_the_pass_manager(example: tuple[types.ModuleType, types.ModuleType]) -> None:
    from exactness import parse

    from graphopt.pass_manager import PassManager
    from graphopt.passes import registry

    model = parse("""<ir_version: 10, opset_import: ["": 21]> g (float[2, 3] x) => (float[2, 3] y) {
        a = Transpose <perm = [1, 0]> (x)
        y = Transpose <perm = [1, 0]> (a)
    }""")
    made = registry.make(f"{EXAMPLE}:MergeTransposes", {"keep-single": True})
    run = PassManager([made])(model)
    assert run.after.nodes == 1  # an Identity: a graph output can't be renamed to an input


def test_the_example_operator_holds_its_tests(tmp_path: Path) -> None:
    """The files of docs/write-an-operator.md, built and tested."""
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            pytest.skip(f"the example operator can't be built: there is no {tool}")
    text = (DOCS / "write-an-operator.md").read_text()
    files = re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(files) == 7
    for name, content in files:
        place = tmp_path / ("tests" if name.startswith("tests/") else "operators/soft_clip") / Path(name).name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(content)
    native, build = ROOT / "graphopt" / "runtime_ops" / "native", tmp_path / "build"
    options = [f"-DGRAPHOPT_OPERATORS={tmp_path / 'operators'}", "-DGRAPHOPT_WERROR=ON", "-DGRAPHOPT_CUDA=OFF"]
    for command in (["cmake", "-S", native, "-B", build, *options], ["cmake", "--build", build, "--parallel"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    (tmp_path / "tests" / "conftest.py").write_text(
        f"import graphopt.runtime_ops as package\npackage.__path__.append({str(tmp_path / 'operators')!r})\n"
    )
    (library,) = build.glob("*graphopt_ops.*")
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "GRAPHOPT_LIBRARY": str(library)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        tmp_path,
        tmp_path / "tests",
    ]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", PAGES, ids=lambda p: str(p.relative_to(DOCS)))
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http:", "https:")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}, which doesn't exist"


def test_generated_pages_are_up_to_date() -> None:
    from graphopt.report.markdown import check_pages
    from graphopt.report.pages import FOLDERS

    for name, pages in FOLDERS.items():
        assert check_pages(DOCS / name, pages(DOCS)) == [], "run `make docs`"


def test_every_recipe_has_its_page() -> None:
    from graphopt import recipe
    from graphopt.passes.base import Guarantee

    listed = (DOCS / "recipes.md").read_text()
    for name in recipe.shipped():
        text = (DOCS / "recipes" / f"{name}.md").read_text()
        assert f"(recipes/{name}.md)" in listed
        sections = re.findall(r"^## (.*)$", text, re.MULTILINE)
        lossy = any(getattr(p, "guarantee", None) is Guarantee.LOSSY for p in recipe.load(name).passes())
        paper = ["Formula", "Source", "What differs from the paper"] if lossy else []
        assert {*paper, "When not to use it", "Run it", "Measured", "Passes"} <= set(sections), name


def commands() -> list[tuple[str, str]]:
    """Every command line of ours in the documentation, with the page it stands on."""
    found = []
    for path in [*PAGES, ROOT / "README.md"]:
        text = path.read_text()
        lines = [line for block in blocks(path, "(?:sh|bash|console|text)?") for line in block.splitlines()]
        lines += re.findall(r"`(graphopt [^`]+)`", text)
        for line in lines:
            line = line.strip().removeprefix("$ ").partition(" #")[0].strip()
            if line.startswith("graphopt "):
                found.append((path.name, line))
    return found


@pytest.mark.parametrize(("page", "line"), sorted(set(commands())))
def test_commands_exist(page: str, line: str) -> None:
    import click

    from graphopt.cli import cli

    words = shlex.split(line.replace("[", "").replace("]", ""))[1:]
    command: click.Command = cli
    context = click.Context(cli)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        following = command.get_command(context, words[0])
        if following is None:
            pytest.fail(f"{page}: there is no command {words[0]!r} in `{line}`")
        command, words = following, words[1:]
    known = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    for word in words:
        if word.startswith("-"):
            option = word.partition("=")[0]
            assert option in {*known, "--help"}, f"{page}: {command.name} has no option {option} (`{line}`)"


def test_python_names_exist() -> None:
    """Dotted names in backticks that begin with `graphopt.` are real."""
    missing = []
    for path in PAGES:
        text = path.read_text()
        for dotted in re.findall(r"`(graphopt(?:\.\w+)+)", text):
            if not _exists(dotted):
                missing.append(f"{path.name}: {dotted}")
    assert not missing, "\n".join(missing)


def _exists(dotted: str) -> bool:
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:count]))
        except ImportError:
            continue
        for name in parts[count:]:
            if not hasattr(thing, name):
                return False
            thing = inspect.getattr_static(thing, name, None) or getattr(thing, name)
        return True
    return False


def test_tolerances_are_those_in_force() -> None:
    from graphopt.verification.compare import TOLERANCES

    rows = [f"| {name} | {t.absolute:g} | {t.relative:g} | {t.floor:g} |" for name, t in TOLERANCES.items()]
    assert "\n".join(rows) in (DOCS / "verification.md").read_text()


def test_metrics_are_those_that_are_measured() -> None:
    from graphopt.verification.quality.floors import METRICS, parse_floor

    text = (DOCS / "quality.md").read_text()
    rows = re.findall(r"^\| (\w+) \| `(\w+)` \| (\w+) \|", text, re.MULTILINE)
    assert rows == [
        (task, name, better) for task, metrics in METRICS.items() for name, (better, _, _) in metrics.items()
    ]
    table = text[text.index("| floor | meaning |") :]
    floors = [
        floor for row in re.findall(r"^\| (`.*) \|", table, re.MULTILINE) for floor in re.findall(r"`([^`]+)`", row)
    ]
    assert len(floors) == 6
    for floor in floors:
        parse_floor(floor)


def test_recipes_and_exit_codes_of_the_guide_exist() -> None:
    from graphopt import errors, recipe

    guide = (DOCS / "user-guide.md").read_text()
    names = sorted(recipe.shipped())
    assert f"({', '.join(f'`{name}`' for name in names)})" in guide
    codes = {c.exit_code for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.GraphoptError)}
    for code in codes:
        assert f"| {code} |" in guide
    for text in blocks(DOCS / "user-guide.md", "yaml"):
        import yaml

        assert recipe.load(yaml.safe_load(text)).passes()


def test_every_choice_is_explained() -> None:
    from graphopt.analysis.choices import CHOICES

    text = (DOCS / "target-profile.md").read_text()
    for choice in CHOICES.values():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{choice.name}` |"))
        named = re.findall(r"`([^`]+)`", row)[1:]
        assert named[0] == choice.default
        assert set(named) == set(choice.alternatives)
