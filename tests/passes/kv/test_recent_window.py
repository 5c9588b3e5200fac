"""The window of low-rank-kv: by its rule in numpy, piece by piece, and how its caches are carried."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_low_rank_kv import details, differs, narrowed, rewritten, steps
from test_share_kv import ASSUMED, exported, parsed
from tiny_decoders import HEADS, KV_HEADS, SIZE

from graphopt.api import optimize
from graphopt.errors import ModelError
from graphopt.export.genai import genai_config
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.kv_names import rename_kv_cache
from graphopt.graph.load import load
from graphopt.graph.save import save
from graphopt.passes.kv.coded_writer import CodedWriter, Coding
from graphopt.passes.kv.feature_bases import Basis
from graphopt.passes.kv.low_rank_kv import LowRankKV
from graphopt.runtime_ops.generation import Generator

Floats = npt.NDArray[np.float64]
Bases = list[tuple[int, Basis, Basis]]
"""By group: its layers, and the bases of its keys and of its values."""


@pytest.fixture
def bases(monkeypatch: pytest.MonkeyPatch) -> Bases:
    """Those that a rewrite uses."""
    found: Bases = []
    together = CodedWriter.together

    def noted(self: CodedWriter, members: Any, keys: Coding, values: Coding) -> None:
        assert keys.basis is not None
        assert values.basis is not None
        found.append((len(members), keys.basis, values.basis))
        together(self, members, keys, values)

    monkeypatch.setattr(CodedWriter, "together", noted)
    return found


def by_the_rule(model: ir.Model, bases: Bases, window: int, pieces: list[int]) -> list[Floats]:
    """The logits of a decoder of `tiny_decoders` on the text of `steps`, by the rule: of the tokens before a run the
    last `window` have their own keys and values, those before them what is rebuilt from their features."""
    weights = {name: v.const_value.numpy().astype(np.float64) for name, v in model.graph.initializers.items()}  # type: ignore[union-attr]
    rng, width = np.random.default_rng(5), KV_HEADS * SIZE
    layers = sum(count for count, _, _ in bases)
    held: list[list[Floats]] = [[np.zeros((0, width)), np.zeros((0, width))] for _ in range(layers)]
    found = []
    for count in pieces:
        ids = rng.integers(3, 40, size=(1, count))[0]
        x, past, first = weights["embedding"][ids], len(held[0][0]), 0
        for together, *pair in bases:
            # What a group keeps of a token is made of the keys of all of its layers.
            olds = []
            for slot, basis in enumerate(pair):
                joint = np.concatenate([held[first + i][slot] for i in range(together)], axis=1)
                olds.append((joint - basis.mean) @ basis.encoder @ basis.decoder + basis.mean)
            for i in range(together):
                layer, own = first + i, slice(i * width, (i + 1) * width)
                full = []
                for slot, name in enumerate("kv"):
                    held[layer][slot] = np.concatenate([held[layer][slot], x @ weights[f"w{name}{layer}"]])
                    older = max(past - window, 0)
                    full.append(np.concatenate([olds[slot][:older, own], held[layer][slot][older:]]))
                q = (x @ weights[f"wq{layer}"]).reshape(count, HEADS, SIZE)
                k, v = (np.repeat(one.reshape(-1, KV_HEADS, SIZE), HEADS // KV_HEADS, axis=1) for one in full)
                scores = np.einsum("qhd,khd->hqk", q, k) * SIZE**-0.5
                scores += np.where(np.arange(past + count) <= np.arange(past, past + count)[:, None], 0.0, -10000.0)
                parts = np.exp(scores - scores.max(axis=2, keepdims=True))
                parts /= parts.sum(axis=2, keepdims=True)
                x = x + np.einsum("hqk,khd->qhd", parts, v).reshape(count, -1) @ weights[f"wo{layer}"]
            first += together
        found.append((x @ weights["head"])[None])
    return found


@pytest.mark.parametrize("window", [1, 3, 5, 100])
@pytest.mark.parametrize("layers", [1, 2])
def test_it_follows_the_rule(window: int, layers: int, bases: Bases) -> None:
    """Pieces longer and shorter than the window, and one token at a time."""
    model = parsed(3)
    result = rewritten(model, keys=0.5, values=0.5, window=window, layers=layers)
    assert details(result)[0].endswith(f"; the last {window} tokens exact")
    pieces = [4, 1, 7, 2, 1, 1, 1, 3]
    expected = by_the_rule(model, bases, window, pieces)
    assert differs(steps(result.model, pieces), expected) < 1e-4
    lowered = optimize(result.model, "lower", verify="none", assume=ASSUMED).model
    assert differs(steps(lowered, pieces), expected) < 1e-4
    # The rule counts: without a window other numbers come out.
    other = rewritten(model, keys=0.5, values=0.5, exact=True, layers=layers).model
    assert differs(steps(other, pieces), expected) > 1e-3


@pytest.mark.export
def test_rotated_keys_have_their_positions() -> None:
    """A full rank changes nothing, so that each key must have been turned once, by its own position."""
    model = exported("llama")
    for layers in (1, 2):
        after = rewritten(model, keys=1.0, values=1.0, layers=layers, window=3).model
        for batch in (1, 2):
            assert differs(steps(after, [6, 1, 2, 1, 5], batch), steps(model, [6, 1, 2, 1, 5], batch)) < 2e-5


def test_the_exact_cache_has_a_length_of_its_own(tmp_path: Path) -> None:
    model = narrowed(parsed(2), 4)
    result = rewritten(model, key_rank=4, value_rank=4, window=3)
    now = kv_interface(result.model)
    assert now is not None
    assert now.problems == ()
    assert [(pair.layer, pair.part, pair.windowed, pair.heads, pair.head_size) for pair in now.pairs] == [
        (layer, part, windowed, KV_HEADS if windowed else 1, SIZE if windowed else 4)
        for layer in (0, 1)
        for part in ("key", "value")
        for windowed in (False, True)
    ]
    save(model, tmp_path / "model.onnx")
    save(optimize(result.model, "lower", verify="none", assume=ASSUMED).model, tmp_path / "after.onnx")
    generator = Generator(tmp_path / "after.onnx")
    assert generator.cache == "growing"
    decoding = generator.start(2, 12)
    for begin, end, recent in ((0, 2, 2), (2, 9, 3), (9, 10, 3)):
        decoding.feed(np.ones((2, end - begin), dtype=np.int64))
        lengths = {name: value.shape()[2] for name, value in decoding.caches.items()}
        assert {lengths[pair.past] for pair in now.pairs if pair.windowed} == {recent}
        assert {lengths[pair.past] for pair in now.pairs if not pair.windowed} == {end}
    # Where nothing is lost, it generates the same, whatever the chunks.
    prompts = [[1, 2, 3, 4, 5], [5, 4, 3, 2, 1]]
    expected = Generator(tmp_path / "model.onnx").generate(prompts, max_new_tokens=12, stop=())
    for chunk in (2, 512):
        assert generator.generate(prompts, max_new_tokens=12, stop=(), chunk=chunk) == expected
    again = load(tmp_path / "after.onnx")
    with pytest.raises(ModelError, match="keeps the rows of a window alone"):
        genai_config(again, "after.onnx", {"max_position_embeddings": 64})
    rename_kv_cache(again)
    inputs = [value.name for value in again.graph.inputs]
    assert [name for name in inputs if "1.key" in (name or "")] == [
        "past_key_values.1.key",
        "past_key_values.1.key.recent",
    ]
    assert kv_interface(again) is not None


def test_a_window_cant_be_negative() -> None:
    with pytest.raises(ValueError, match="window"):
        LowRankKV(window=-1)


def test_what_is_written_is_verified() -> None:
    from test_low_rank_kv import text

    recipe = {"passes": [{"low-rank-kv": {"window": 4}}, {"recipe": "lower"}]}
    result = optimize(parsed(2), recipe, verify="pass", calibration=text(), assume=ASSUMED)
    assert result.report.ok
