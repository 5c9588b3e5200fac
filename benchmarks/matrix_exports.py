"""Exports of the tiny models of `matrix_models` and `matrix_modules`, each with probe inputs and PyTorch's answer.

    python benchmarks/matrix_exports.py --folder build/attention-matrix/exports --models llama bert

For each model and variant three files are kept: the model, its probes (inputs, and outputs of PyTorch), and a record
with what was counted or why there is no export. What is there isn't made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matrix_modules  # noqa: F401
import numpy as np
import onnx
import torch
from matrix_models import MODELS, Model, built, feeds
from matrix_texts import TEXTS
from matrix_truth import count_sites
from matrix_variants import Variant, variants_of

from graphopt.errors import first_line
from graphopt.export.dependencies import quiet

LIMIT_SECONDS = 300


@dataclasses.dataclass(frozen=True)
class Probe:
    """Sizes of one probe input; `left` and `right` tokens of the first row are masked."""

    batch: int
    tokens: int
    past: int = 0
    left: int = 0
    right: int = 0


PROBES = (Probe(1, 7), Probe(3, 5), Probe(3, 6, right=2), Probe(3, 6, left=2))
CACHED = (
    Probe(1, 6), Probe(1, 1, past=5), Probe(3, 4, right=1), Probe(3, 1, past=5, left=2), Probe(3, 3, past=4, left=2),
    Probe(1, 9, past=8),
)  # fmt: skip
SAMPLE, CACHED_SAMPLE = Probe(2, 7), Probe(2, 4, past=6)


class Positional(torch.nn.Module):
    """The model as a function of tensors in a row, that gives a tuple of tensors; the cache as tensors too."""

    def __init__(self, module: Any, names: Sequence[str], cached: bool) -> None:
        super().__init__()
        self.module, self.names, self.cached = module, names, cached
        accepted = inspect.signature(module.forward).parameters
        self.more = {"use_cache": cached} if "use_cache" in accepted else {}

    def forward(self, *tensors: Any) -> Any:
        given = dict(zip(self.names, tensors, strict=False))
        if not self.cached:
            return _tensors(self.module(**given, **self.more))
        import transformers

        past, cache = tensors[len(self.names) :], transformers.DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        result = self.module(**given, past_key_values=cache, **self.more)
        present = [t for layer in result.past_key_values.layers for t in (layer.keys, layer.values)]
        return (result.logits, *present)


def _tensors(result: Any) -> tuple[Any, ...]:
    if isinstance(result, torch.Tensor):
        return (result,)
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    found: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
    return tuple(found)


@dataclasses.dataclass
class Case:
    """One model with or without a cache, ready to be exported."""

    model: Model
    module: Positional
    names: list[str]
    past: list[tuple[int, int]]
    sample: Probe
    probes: Sequence[Probe]

    @property
    def inputs(self) -> list[str]:
        return [*self.names, *_pairs("past_key_values", len(self.past))]

    def feeds(self, probe: Probe) -> dict[str, np.ndarray]:
        """Arrays by input."""
        arrays = feeds(self.model, probe.batch, probe.tokens, probe.past, probe.right, seed=1)
        mask = arrays.get("attention_mask")
        if mask is not None:
            mask[0, : probe.left] = 0
        if "position_ids" in self.names:
            assert mask is not None
            arrays["position_ids"] = np.maximum(mask.cumsum(1) - 1, 0)[:, probe.past :]
        rng = np.random.default_rng(2)
        for name, (heads, size) in zip(self.inputs[len(self.names) :], self.past, strict=True):
            arrays[name] = rng.normal(size=(probe.batch, heads, probe.past, size)).astype(np.float32)
        return {name: arrays[name] for name in self.inputs}


def _pairs(prefix: str, count: int) -> list[str]:
    return [f"{prefix}.{i // 2}.{('key', 'value')[i % 2]}" for i in range(count)]


def make_case(model: Model, variant: Variant) -> Case:
    """The module of a variant, with the sizes of its cache."""
    module = built(model.key)
    if model.implementations:
        parts = {"backbone_config": "eager"} if hasattr(module.config, "backbone_config") else {}
        module.set_attn_implementation({"": variant.attention, **parts} if parts else variant.attention)
        held = getattr(module.config, "_attn_implementation", None)
        if held != variant.attention:
            raise NotImplementedError(f"transformers has no {variant.attention} implementation of it")
    return case_of(model, module, variant.cached)


def case_of(model: Model, module: Any, cached: bool) -> Case:
    """A module that is fed as the model is, with the sizes of its cache where it has one."""
    names = list(feeds(model, 1))
    if not cached:
        return Case(model, Positional(module, names, False).eval(), names, [], SAMPLE, PROBES)
    if "position_ids" in inspect.signature(module.forward).parameters:
        names.append("position_ids")
    with torch.no_grad():
        cache = module(torch.zeros(1, 3, dtype=torch.long), use_cache=True).past_key_values
    shapes = [t.shape for layer in cache.layers for t in (layer.keys, layer.values)]
    sizes = [(shape[1], shape[3]) for shape in shapes]
    return Case(model, Positional(module, names, True).eval(), names, sizes, CACHED_SAMPLE, CACHED)


def dynamic(case: Case) -> dict[str, dict[int, str]]:
    """The dynamic dimensions by input: those in which the sample and the probes differ by their sizes."""
    found: dict[str, dict[int, str]] = {}
    for name in case.inputs:
        axes = {0: "batch"}
        if name.startswith("past_key_values"):
            axes[2] = "past"
        elif name == "attention_mask" and case.past:
            axes[1] = "total"
        elif name in ("text", "image"):
            pass
        elif name == "x" and case.model.kind == "series":
            axes[2] = "tokens"
        elif case.model.kind not in ("map", "spectrum") and name not in ("pixel_values", "input_features"):
            axes[1] = "output_tokens" if name.startswith("decoder_") else "tokens"
        found[name] = axes
    return found


def export(case: Case, variant: Variant, path: Path) -> list[str]:
    """Write the model; gives the names of its outputs."""
    arguments = tuple(torch.from_numpy(array) for array in case.feeds(case.sample).values())
    with torch.no_grad():
        count = len(case.module(*arguments))
    present = _pairs("present", len(case.past))
    outputs = ["logits", *present] if present else [f"output_{i}" for i in range(count)]
    axes = dynamic(case)
    options: dict[str, Any] = {
        "opset_version": variant.opset or None,
        "input_names": case.inputs,
        "output_names": outputs,
    }
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad(), quiet():
        if variant.exporter == "export":
            shapes = tuple(axes[name] for name in case.inputs)
            torch.onnx.export(
                case.module, arguments, path, dynamo=True, dynamic_shapes=(shapes,), external_data=False, verbose=False,
                **options,
            )  # fmt: skip
        else:
            torch.onnx.export(case.module, arguments, path, dynamo=False, dynamic_axes=axes, **options)
    return outputs


def answers(case: Case, path: Path) -> None:
    """Keep the probes with PyTorch's outputs."""
    arrays: dict[str, np.ndarray] = {}
    for index, probe in enumerate(case.probes):
        given = case.feeds(probe)
        try:
            with torch.no_grad():
                results = case.module(*(torch.from_numpy(array) for array in given.values()))
        except (RuntimeError, ValueError, IndexError):
            continue  # the model itself doesn't take this size
        arrays |= {f"{index}/in/{name}": array for name, array in given.items()}
        arrays |= {f"{index}/out/{place}": tensor.numpy() for place, tensor in enumerate(results)}
    np.savez(path, **arrays)


def make(model: Model, variant: Variant, folder: Path) -> None:
    """Make the files of one model and variant, if they aren't there."""
    place = folder / variant.file(model.key)
    record = place.with_suffix(".json")
    if record.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    if model.key in TEXTS:
        onnx.save(model.build(), place)
        given = [feeds(model, probe.batch, probe.tokens, padded=probe.right) for probe in PROBES]
        arrays = {f"{i}/in/{name}": array for i, inputs in enumerate(given) for name, array in inputs.items()}
        np.savez(place.with_suffix(".npz"), **arrays)
        record.write_text(json.dumps({"outputs": ["y"], "sites": {"softmax": model.sites, "others": model.others}}))
        return
    start = time.perf_counter()
    told: dict[str, Any] = {"error": "the exporter's process died"}
    # Written first: where the process dies, the next one goes on behind this.
    record.write_text(json.dumps(told))
    signal.alarm(LIMIT_SECONDS)
    try:
        with quiet():
            case = make_case(model, variant)
            told = {"sites": count_sites(case.module, [torch.from_numpy(a) for a in case.feeds(case.sample).values()])}
            answers(case, place.with_suffix(".npz"))
            told["outputs"] = export(case, variant, place)
    except Exception as error:
        place.unlink(missing_ok=True)
        told = {"error": f"{type(error).__name__}: {_cause(error)}"}
    finally:
        signal.alarm(0)
    told["seconds"] = round(time.perf_counter() - start, 2)
    record.write_text(json.dumps(told))


def _cause(error: BaseException) -> str:
    """The first line of the error at the bottom of a chain: the exporter wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)[:200]


def _late(*_: object) -> None:
    raise TimeoutError(f"the export took more than {LIMIT_SECONDS} s")


def make_all(keys: Iterable[str], names: Sequence[str] | None, folder: Path) -> None:
    """Make what is missing of these models in these variants."""
    signal.signal(signal.SIGALRM, _late)
    torch.set_num_threads(1)
    for key in keys:
        for variant in variants_of(MODELS[key], names):
            make(MODELS[key], variant, folder)


def main() -> None:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--variants", nargs="*")
    options = parser.parse_args()
    make_all(options.models, options.variants, options.folder)


if __name__ == "__main__":
    main()
