"""Recipes: a short YAML list of passes with options.

    passes:
      - fold-constants
      - raise-gelu
      - simplify-shapes: {max_elements: 64}
    assume: [no-left-padding]

`assume:` may be left out; see `graphopt.graph.assumptions`. The steps of another recipe stand in a list as
`- recipe: NAME`.

`--recipe` takes such a file or the name of one that ships in `graphopt/models/recipes/`, and several joined by `+`,
which run one behind the other: `exact+decode`. Where several are the recipe `canonical`, what compresses, and the
recipe `lower`, they become one of that form: `rtn+kv8` compresses twice between the two. A digit behind the name of a
recipe that quantizes weights is their bits: `awq3`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import yaml

from graphopt.errors import UsageError
from graphopt.graph.assumptions import NOTHING, Assumptions
from graphopt.passes import registry
from graphopt.passes.base import Guarantee, Pass

DEFAULT = "exact"


@dataclasses.dataclass(frozen=True)
class Step:
    """One pass of a recipe with its options."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_data(self) -> str | dict[str, Any]:
        """The step as it is written in YAML."""
        return {self.name: dict(self.options)} if self.options else self.name


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A named list of steps.

    Attributes:
        name: The recipe's name, or the file it came from.
        description: The first paragraph of the comment that the file opens with.
        steps: The passes in order.
        assume: What the passes may take for granted about inputs.
    """

    name: str
    steps: tuple[Step, ...]
    description: str = ""
    assume: Assumptions = NOTHING

    def passes(self, target: str | None = None) -> list[ir.passes.PassBase]:
        """Make the passes, leaving out those that are for other targets than `target` (None: all).

        Raises:
            UsageError: An unknown pass or option; or a lossy pass is for other targets, without which the recipe would
                do something else than what it is for.
        """
        made = []
        for step in self.steps:
            pass_ = registry.make(step.name, {**_of_target(step.name, target), **step.options})
            targets = getattr(pass_, "targets", ())
            if target is None or not targets or target in targets:
                made.append(pass_)
            elif isinstance(pass_, Pass) and pass_.guarantee is Guarantee.LOSSY:
                raise UsageError(
                    f"The pass {step.name!r} of the recipe {self.name} is for the target {', '.join(targets)}, "
                    f"not for {target}; choose another target, or a recipe that quantizes weights alone, such as rtn."
                )
        return made

    def with_options(self, assignments: Sequence[str]) -> Recipe:
        """The recipe with options changed, given as `option=value`, for all of its passes that have that option, or
        `pass.option=value`; a value is YAML.

        Raises:
            UsageError: Not of that form, or no pass of the recipe has the option.
        """
        steps = list(self.steps)
        for text in assignments:
            name, sign, value = text.partition("=")
            pass_, _, option = name.strip().rpartition(".")
            option = option.replace("-", "_")
            if not sign or not option:
                raise UsageError(f"{text!r} sets no option; write option=value or pass.option=value, such as bits=3.")
            try:
                given = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise UsageError(f"The value of {text!r} can't be read: {' '.join(str(error).split())}.") from error
            found = [
                i
                for i, step in enumerate(steps)
                if (not pass_ or step.name == pass_) and option in _options_of(step.name)
            ]
            if not found:
                where = f"the pass {pass_!r}" if pass_ else "no pass"
                raise UsageError(
                    f"{option!r} can't be set: {where} of the recipe {self.name} "
                    f"{'has no such option, or is not in it' if pass_ else 'has such an option'}."
                )
            for i in found:
                steps[i] = Step(steps[i].name, {**steps[i].options, option: given})
        return dataclasses.replace(self, steps=tuple(steps))

    def to_data(self) -> dict[str, Any]:
        """The recipe as YAML would hold it."""
        data: dict[str, Any] = {"passes": [step.to_data() for step in self.steps]}
        return {**data, "assume": list(self.assume.names)} if self.assume else data


def _options_of(name: str) -> frozenset[str]:
    """The names of a pass's options; none where it isn't one of graphopt's."""
    found = registry.find(name)
    return frozenset(found.options()) if issubclass(found, Pass) else frozenset()


def shipped() -> dict[str, str]:
    """Names and texts of the recipes that ship."""
    folder = importlib.resources.files("graphopt.models") / "recipes"
    return {
        f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8")
        for f in sorted(folder.iterdir(), key=lambda f: f.name)
        if f.name.endswith(".yaml")
    }


def _of_target(name: str, target: str | None) -> Mapping[str, Any]:
    """Options of a pass that a target asks for."""
    return getattr(registry.find(name), "portable", {}) if target == "portable" else {}


def load(source: str | os.PathLike[str] | Mapping[str, Any] | Recipe | None = None) -> Recipe:
    """A recipe from a file, the name of one that ships, several of these joined by "+", parsed YAML, or None for the
    default.

    Raises:
        UsageError: No such recipe, no YAML, or not of the form above.
    """
    if isinstance(source, Recipe):
        return source
    if isinstance(source, Mapping):
        return _from_data(source, "inline", "")
    if not isinstance(source, str | os.PathLike | None):
        raise UsageError(
            f"A recipe must be a name, a file or a mapping such as {{'passes': [...]}}, not {type(source).__name__}."
        )
    name = os.fspath(source) if source is not None else DEFAULT
    if "+" in name and not Path(name).is_file():
        parts = [load(part.strip()) for part in name.split("+")]
        assumed = Assumptions.parse([one for part in parts for one in part.assume.names])
        return Recipe(name, _joined(parts), parts[-1].description, assumed)
    if Path(name).suffix in (".yaml", ".yml") or Path(name).is_file():
        try:
            text = Path(name).read_text(encoding="utf-8")
        except OSError as error:
            raise UsageError(f"The recipe {name} can't be read: {error.strerror}.") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"The recipe {name} isn't text in UTF-8.") from error
    else:
        known = shipped()
        if name not in known and (match := re.fullmatch(r"(.*\D)([2-8])", name)) and match[1] in known:
            plain = load(match[1])
            if any("bits" in _options_of(step.name) for step in plain.steps):
                return dataclasses.replace(plain.with_options([f"bits={match[2]}"]), name=name)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else f"those that ship are {', '.join(known)}."
            raise UsageError(f"There is no recipe {name!r}; {hint} A recipe file ends in .yaml.")
        text = known[name]
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"The recipe {name} is not valid YAML: {' '.join(str(error).split())}.") from error
    return _from_data(data, name, described(text)[0])


def _from_data(data: Any, name: str, description: str) -> Recipe:
    if not isinstance(data, Mapping) or not isinstance(data.get("passes"), list):
        raise UsageError(f"The recipe {name} has no list `passes:`.")
    if unknown := sorted(set(data) - {"passes", "assume"}, key=str):
        raise UsageError(f"The recipe {name} has the unknown key {unknown[0]!r}; it holds `passes:` and `assume:`.")
    if not data["passes"]:
        raise UsageError(f"The list `passes:` of the recipe {name} is empty; `graphopt passes` lists what there is.")
    assume = data.get("assume") or []
    if not isinstance(assume, list) or not all(isinstance(item, str) for item in assume):
        raise UsageError(f"`assume:` of the recipe {name} must be a list of names, such as [no-left-padding].")
    steps: list[Step] = []
    assumed = Assumptions.parse(assume)
    for step in _steps(data["passes"], name):
        if isinstance(step, Step):
            steps.append(step)
        else:
            steps += step.steps
            assumed |= step.assume
    return Recipe(name, tuple(steps), description, assumed)


def _steps(items: list[Any], name: str) -> Iterator[Step | Recipe]:
    for number, item in enumerate(items, 1):
        if isinstance(item, str):
            yield Step(item)
        elif isinstance(item, Mapping) and list(item) == ["recipe"]:
            part = item["recipe"]
            if not isinstance(part, str) or part == name:
                raise UsageError(f"Entry {number} of the recipe {name} must name another recipe: `recipe: NAME`.")
            yield _part(part, name)
        elif isinstance(item, Mapping) and len(item) == 1:
            ((key, options),) = item.items()
            options = {} if options is None else options
            named = isinstance(options, Mapping) and all(isinstance(option, str) for option in options)
            if not isinstance(key, str) or not named:
                raise UsageError(f"Entry {number} of the recipe {name} must be `name` or `name: {{option: value}}`.")
            yield Step(key, dict(options))
        else:
            raise UsageError(f"Entry {number} of the recipe {name} must be `name` or `name: {{option: value}}`.")


def _joined(parts: list[Recipe]) -> tuple[Step, ...]:
    """The steps of several recipes: what stands between `canonical` and `lower` comes together, the rest behind it."""
    first, last = load("canonical").steps, load("lower").steps

    def end(steps: tuple[Step, ...]) -> int | None:
        """Where `lower` begins in a recipe that opens with `canonical`."""
        places = range(len(first), len(steps) - len(last) + 1) if steps[: len(first)] == first else ()
        return next((i for i in places if steps[i : i + len(last)] == last), None)

    ends = [end(part.steps) for part in parts]
    if ends[0] is None:
        return tuple(step for part in parts for step in part.steps)
    between: list[Step] = []
    behind: list[Step] = []
    for part, place in zip(parts, ends, strict=True):
        if place is None:
            behind += part.steps
        else:
            between += part.steps[len(first) : place]
            behind += part.steps[place + len(last) :]
    return (*first, *between, *last, *behind)


def _part(part: str, name: str) -> Recipe:
    """A recipe that stands in another.

    Raises:
        UsageError: It can't be read, or they stand in each other.
    """
    try:
        return load(part)
    except RecursionError:
        raise UsageError(f"The recipe {name} leads back to itself through {part}.") from None


def described(text: str) -> tuple[str, str]:
    """What a recipe file says of itself: the first paragraph of its opening comment on one line, and what follows."""
    paragraph, _, sections = opening_comment(text).partition("\n\n")
    return " ".join(paragraph.split()), sections


def opening_comment(text: str) -> str:
    """The comment that a recipe file opens with, in Markdown: a paragraph that describes it, then sections."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].removeprefix(" ").rstrip())
    return "\n".join(lines).strip()
