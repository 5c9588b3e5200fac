"""graphopt rewrites a trained ONNX model into a smaller, faster one and proves that it does the same job.

    import graphopt
    result = graphopt.optimize("model.onnx")
    result.save("model.opt.onnx")

Names are imported when they are first used, so that `import graphopt` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PLACES = {
    "load": "graphopt.graph",
    "save": "graphopt.graph",
    "optimize": "graphopt.api",
    "verify": "graphopt.api",
    "inspect": "graphopt.api",
    "evaluate": "graphopt.evaluation.judging",
    "Result": "graphopt.api",
    "PassManager": "graphopt.pass_manager",
    "Pass": "graphopt.passes.base",
    "RulePass": "graphopt.passes.base",
    "Guarantee": "graphopt.passes.base",
    "Recipe": "graphopt.recipe",
    "session": "graphopt.runtime_ops.session",
    "Generator": "graphopt.runtime_ops.generation",
    "Sampling": "graphopt.runtime_ops.sampling",
    "Eviction": "graphopt.runtime_ops.eviction",
    "perplexity": "graphopt.runtime_ops.scoring",
    "export_model": "graphopt.export",
    "package": "graphopt.export.serving_package",
    "GraphoptError": "graphopt.errors",
}

__all__ = ["__version__", *_PLACES]

if TYPE_CHECKING:
    from graphopt.api import Result as Result
    from graphopt.api import inspect as inspect
    from graphopt.api import optimize as optimize
    from graphopt.api import verify as verify
    from graphopt.errors import GraphoptError as GraphoptError
    from graphopt.evaluation.judging import evaluate as evaluate
    from graphopt.export import export_model as export_model
    from graphopt.export.serving_package import package as package
    from graphopt.graph import load as load
    from graphopt.graph import save as save
    from graphopt.pass_manager import PassManager as PassManager
    from graphopt.passes.base import Guarantee as Guarantee
    from graphopt.passes.base import Pass as Pass
    from graphopt.passes.base import RulePass as RulePass
    from graphopt.recipe import Recipe as Recipe
    from graphopt.runtime_ops.eviction import Eviction as Eviction
    from graphopt.runtime_ops.generation import Generator as Generator
    from graphopt.runtime_ops.sampling import Sampling as Sampling
    from graphopt.runtime_ops.scoring import perplexity as perplexity
    from graphopt.runtime_ops.session import session as session


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
