"""Which weights of the base an adapter changes, and whether it fits them; nothing is read but names and shapes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.errors import UsageError, first_line
from graphopt.export.adapters.checkpoint import WRAPPED, Adapter, Named
from graphopt.export.adapters.site import Array, Site


@dataclass(frozen=True)
class Target:
    """One weight that an adapter changes.

    Attributes:
        adapter: The adapter.
        share: What its ΔW is multiplied by.
        module: The module's path in the adapter.
        turned: Whether the base stores the weight as [in, out].
        outputs: Its output features.
        inputs: Its input features, of a convolution times kernel positions.
    """

    adapter: Adapter
    share: float
    module: str
    turned: bool
    outputs: int
    inputs: int

    def site(self, shared: Callable[[str], Array]) -> Site:
        """The adapter's numbers for the module, read now."""
        found = {name: self.adapter.array(key) for name, key in self.adapter.modules[self.module].items()}
        tensors = Named(found, f"{self.adapter.path} lacks", f" of {self.module}")
        return Site(self.module, tensors, shared, self.adapter.config, self.outputs, self.inputs)

    @contextlib.contextmanager
    def fitting(self) -> Iterator[None]:
        """What the shapes of the tensors don't allow is said in a sentence.

        Raises:
            UsageError: A formula met shapes that don't fit each other or the weight.
        """
        try:
            yield
        except (ValueError, IndexError) as error:
            raise UsageError(
                f"{self.adapter.path}: the tensors of {self.module} don't fit each other or the base's weight of "
                f"{self.outputs} × {self.inputs} features: {first_line(error)}"
            ) from error


class Names:
    """The base's names for what an adapter calls a module.

    They are the same, or the same but for the first parts of all of them: an adapter of a language model's body alone,
    of a body inside of another model, or of a module that was wrapped or is called otherwise today.
    """

    def __init__(self, adapter: Adapter, known: Mapping[str, None]) -> None:
        self._adapter, self._known = adapter, known
        modules = list(adapter.modules)
        fits = {p: sum(self._found(m, *p) for m in modules) for p in self._prefixes(modules)}
        # The one that most modules fit with: a module that fits with none is told by the name it would have.
        self._drop, self._add = max(fits, key=lambda p: fits[p])

    def weight(self, module: str) -> str:
        """The name of a module's weight.

        Raises:
            UsageError: The base has none.
        """
        found = self._find(module, self._drop, self._add)
        if found is None:
            key = next(iter(self._adapter.modules[module].values()))
            near = next((n for n in sorted(self._known) if n.endswith(f".{module.rpartition('.')[2]}.weight")), None)
            hint = f"; there is {near}" if near else ""
            raise UsageError(
                f"{self._adapter.folder} is of another base: it has {key}, and the base has no parameter "
                f"{self._moved(module, self._drop, self._add)}.weight{hint}"
            )
        return found

    def stacked(self, module: str) -> list[str]:
        """The targeted parameters of a module that has no weight of its own, in the base's order."""
        return self._stacked(module, self._drop, self._add)

    def _found(self, module: str, drop: str, add: str) -> bool:
        return self._find(module, drop, add) is not None or bool(self._stacked(module, drop, add))

    def _stacked(self, module: str, drop: str, add: str) -> list[str]:
        asked = tuple(map(str, self._adapter.config.get("target_parameters") or ()))
        if not asked or self._find(module, drop, add) is not None:
            return []
        stem = self._moved(module.partition(WRAPPED)[0], drop, add) + "."
        inside = [n for n in self._known if n.startswith(stem) and "." not in n.removeprefix(stem)]
        return [n for n in inside if any(f".{n}".endswith(f".{a.rpartition('.')[2]}") for a in asked)]

    def times(self, module: str) -> int:
        """How often peft adds a module's change: that of nn.MultiheadAttention's output projection twice.

        It does so when it merges and when it runs the adapter, so the adapter was trained for it.
        """
        outer, _, last = module.rpartition(".")
        double = last == "out_proj" and outer in self._adapter.modules
        return 2 if double and self.weight(outer).endswith(".in_proj_weight") else 1

    def bias(self, module: str) -> str | None:
        """The name of a module's bias; None where the base has none."""
        stem, _, kind = self.weight(module).rpartition(".")
        name = f"{stem}.in_proj_bias" if kind == "in_proj_weight" else f"{stem}.bias"
        return name if name in self._known else None

    def parameter(self, name: str) -> str:
        """The base's name for a parameter that the adapter holds whole."""
        moved = self._moved(name, self._drop, self._add)
        return name if name in self._known or moved not in self._known else moved

    def _prefixes(self, modules: list[str]) -> Iterator[tuple[str, str]]:
        """What to drop from the front of every name, and what to put there instead; nothing of both first."""
        yield "", ""
        known = [n.rpartition(".")[0] for n in self._known if n.endswith((".weight", ".in_proj_weight"))]
        plain = [m for m in modules if WRAPPED not in m]
        if not plain:
            return
        first = min(plain, key=len)
        parts = first.split(".")
        for count in range(min(3, len(parts))):
            drop, rest = "".join(f"{part}." for part in parts[:count]), ".".join(parts[count:])
            ends = sorted((n for n in known if f".{n}".endswith(f".{rest}")), key=len)
            yield from ((drop, name.removesuffix(rest)) for name in ends[:4])

    def _find(self, module: str, drop: str, add: str) -> str | None:
        if not module.startswith(drop):
            return None
        moved = self._moved(module, drop, add)
        return next((n for n in (f"{moved}.weight", f"{moved}.in_proj_weight") if n in self._known), None)

    @staticmethod
    def _moved(module: str, drop: str, add: str) -> str:
        return add + module.removeprefix(drop)


def unmatched(adapter: Adapter, known: Iterable[str]) -> list[str]:
    """A sentence for each entry of `target_modules` that none of the adapter's modules has.

    Raises:
        UsageError: The base has such a module, so the adapter's file lacks it.
    """
    targets = adapter.config.get("target_modules")
    if not isinstance(targets, list) or adapter.config.get("exclude_modules"):
        return []
    changed = {*adapter.modules, *(name.rpartition(".")[0] for name in adapter.replaced)}
    in_base = {name.rpartition(".")[0] for name in known}
    told = []
    for target in map(str, targets):
        if any(m == target or m.endswith(f".{target}") for m in changed):
            continue
        if any(m == target or m.endswith(f".{target}") for m in in_base):
            raise UsageError(
                f"{adapter.path} has nothing for the target module {target!r} of its adapter_config.json, which the "
                "base has"
            )
        told.append(f"{adapter.folder}: the target module {target!r} of its adapter_config.json matches no module")
    return told


def target_of(adapter: Adapter, share: float, module: str, weight: str, shape: tuple[int, ...], turned: bool) -> Target:
    """The change of one weight, with its orientation by the shapes and, of square ones, by the configuration.

    Args:
        adapter: The adapter.
        share: What its ΔW is multiplied by.
        module: The module's path in the adapter.
        weight: The base's name of the weight.
        shape: The base's shape of it.
        turned: Whether the caller knows it to be stored as [in, out].

    Raises:
        UsageError: The shapes don't fit.
    """
    keys = adapter.modules[module]
    shapes = {name: adapter.shapes[key] for name, key in keys.items()}
    if len(shape) < 2:
        raise UsageError(
            f"{adapter.folder} is of another base: the base's {weight} is {shape_text(shape)}, not a matrix"
        )
    try:
        out, into = adapter.method.features(shapes, adapter.config)
    except (KeyError, IndexError, ValueError, StopIteration, RuntimeError) as error:
        raise UsageError(f"{adapter.path} lacks tensors for {module}: it has {', '.join(sorted(keys))}") from error
    rows, columns = shape[0], int(np.prod(shape[1:]))
    straight = out in (None, rows) and into in (None, columns)
    swapped = len(shape) == 2 and out in (None, columns) and into in (None, rows)
    asked = turned or (any("embedding" in name for name in keys) and "oft_embedding_R" not in keys)
    asked = asked or bool(adapter.config.get("fan_in_fan_out"))
    # One size of two could fit by chance, in the wrong place.
    swapped = swapped and (asked or None not in (out, into))
    if not straight and not swapped:
        name = next(iter(keys.values()))
        raise UsageError(
            f"{adapter.folder} is of another base: {name} fits a weight of {out or 'any'} × {into or 'any'} features, "
            f"and the base's {weight} is {shape_text(shape)}"
        )
    turned = swapped and (not straight or asked)
    rows, columns = (columns, rows) if turned else (rows, columns)
    return Target(adapter, share, module, turned, rows, columns)


def token_indices(adapter: Adapter, key: str) -> Array:
    """The rows of an embedding that the tensor `key` of the adapter replaces, int64."""
    found = adapter.config.get("token_indices") or adapter.config.get("trainable_token_indices") or []
    if isinstance(found, Mapping):
        found = next((v for k, v in found.items() if f".{k}." in f".{key}"), [])
    return np.asarray(found, np.int64)


def saved_whole(adapter: Adapter, parameter: str) -> bool:
    """Whether the configuration says that the module of this parameter was trained in full."""
    module = parameter.rpartition(".")[0]
    saved = adapter.config.get("modules_to_save") or []
    return any(f".{name}." in f".{module}." for name in map(str, saved))


def shape_text(shape: Sequence[int | None]) -> str:
    """A shape in words: 4×16."""
    return "×".join(map(str, shape)) if shape else "a single number"
