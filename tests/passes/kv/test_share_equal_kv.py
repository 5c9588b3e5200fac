"""share-equal-kv: decoders of Value Residual Learning by both exporters, what is equal and what isn't, and the tools."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest
import tiny_decoders
from click.testing import CliRunner
from tiny_value_residual import DEPTH, KV_HEADS, LAYERS, Form, caches, exported, fed

from graphopt.api import optimize, verify
from graphopt.cli import cli
from graphopt.errors import ModelError, VerificationError
from graphopt.export.genai import genai_config
from graphopt.graph.equal_caches import EQUAL_KEY, equal_caches
from graphopt.graph.kept_layers import kept_layers
from graphopt.graph.kv_interface import kv_interface
from graphopt.graph.load import load
from graphopt.passes.kv.share_equal_kv import ShareEqualKV
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.memory_session import make_session

Arrays = dict[str, npt.NDArray[Any]]
RECIPE = "share-equal-kv"
ASSUMED = ["no-left-padding", "no-batched-chunks", "counted-positions", "max-length=64"]
ALL = caches("svformer")
LEFT: dict[Form, list[str]] = {
    "svformer": ["0.key", "0.value", "1.key", "2.key"],
    "svformer-unused": ["0.key", "0.value", "1.key", "2.key"],
    "separate": ALL,
    "mixed": ALL,
    "cross-layer": ["0.key", "0.value"],
    "llama": ALL,
}
"""The caches that are left."""
CASES: list[tuple[Form, str]] = [
    ("svformer", "dynamo"), ("svformer", "torchscript"), ("svformer-unused", "torchscript"),
    ("separate", "torchscript"), ("mixed", "torchscript"), ("cross-layer", "torchscript"), ("llama", "torchscript"),
]  # fmt: skip


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("value-residual")


def decoder(form: Form, exporter: str, folder: Path) -> Path:
    path = folder / f"{form}-{exporter}.onnx"
    return path if path.exists() else exported(form, exporter, folder)


def step_by_step(path: Path, form: Form, ids: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """Logits of the original, fed piece by piece, with a cache for everything."""
    session = make_session(load(path))
    held = {name: np.zeros((len(ids), KV_HEADS, 0, DEPTH), np.float32) for name in caches(form)}
    found = []
    for begin, end in ((0, 5), (5, 6), (6, 9), (9, 10)):
        feeds = fed(form, len(ids), begin, end - begin)
        feeds |= {"input_ids": ids[:, begin:end], **{f"past.{name}": array for name, array in held.items()}}
        logits, *presents = session.run(["logits", *(f"present.{name}" for name in held)], feeds)
        held = dict(zip(held, presents, strict=True))
        found.append(logits)
    return np.concatenate(found, axis=1)


@pytest.mark.export
@pytest.mark.parametrize(("form", "exporter"), CASES)
def test_decoders_keep_equal_caches_once(form: Form, exporter: str, exports: Path, tmp_path: Path) -> None:
    path = decoder(form, exporter, exports)
    result = optimize(path, RECIPE, assume=ASSUMED)
    assert result.report.ok
    interface = kv_interface(result.model)
    assert interface is not None
    assert interface.problems == ()
    assert [pair.past for pair in interface.pairs] == [f"past.{name}" for name in LEFT[form]]
    assert [pair.present for pair in interface.pairs] == [f"present.{name}" for name in LEFT[form]]
    gone = [name for name in caches(form) if name not in LEFT[form]]
    assert sorted(equal_caches(result.model)) == sorted(
        f"{side}.{name}" for side in ("past", "present") for name in gone
    )
    result.save(tmp_path / "once.onnx")
    # Piece by piece, both from empty caches.
    ids = np.random.default_rng(0).integers(0, 100, size=(1, 10))
    expected = step_by_step(path, form, ids)
    decoding = Generator(tmp_path / "once.onnx").start(1, 10)
    pieces = [np.array(decoding.feed(ids[:, b:e])) for b, e in ((0, 5), (5, 6), (6, 9), (9, 10))]
    assert np.abs(np.concatenate(pieces, axis=1) - expected).max() <= 1e-5 * np.abs(expected).max()
    if form == "svformer":
        for one, other in ((path, tmp_path / "once.onnx"), (tmp_path / "once.onnx", path)):
            assert verify(one, other).ok
    assert not ShareEqualKV()(result.model).modified


@pytest.mark.export
def test_weights_of_unused_values_go(exports: Path) -> None:
    sizes = []
    for form in ("svformer", "svformer-unused"):
        model = optimize(decoder(form, "torchscript", exports), RECIPE, assume=ASSUMED).model  # type: ignore[arg-type]
        sizes.append(sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value))
    assert sizes[0] == sizes[1]


@pytest.mark.export
def test_the_command_line_verifies_it_and_the_tools_read_it(exports: Path, tmp_path: Path) -> None:
    path, out = decoder("svformer", "dynamo", exports), tmp_path / "once.onnx"
    run = CliRunner().invoke(cli, ["optimize", str(path), "--recipe", RECIPE, "--verify", "pass", "-o", str(out)])
    assert run.exit_code == 0, run.output
    assert "rolled back" not in run.output
    model = load(out)
    assert len([v for v in model.graph.inputs if (v.name or "").endswith("value")]) == 1
    assert kept_layers(model) is None
    assert CliRunner().invoke(cli, ["verify", str(path), str(out)]).exit_code == 0
    with pytest.raises(ModelError, match=r"'past\.1\.key' stands alone in its layer"):
        genai_config(model, "model.onnx", {"max_position_embeddings": 64})
    # By the convention, names and what they stand for go together.
    renamed = tmp_path / "renamed.onnx"
    run = CliRunner().invoke(cli, ["optimize", str(path), "--recipe", RECIPE, "--rename-kv-cache", "-o", str(renamed)])
    assert run.exit_code == 0, run.output
    assert equal_caches(load(renamed))["past.2.value"] == "past_key_values.0.value"
    assert verify(path, renamed).ok
    # What quantizes caches behind it leaves those that are shared in part.
    result = optimize(path, f"{RECIPE}+kv8", assume=ASSUMED)
    assert result.report.ok
    assert any("with other keys or values beside" in site.detail for _, site in result.report.run.left())


@pytest.mark.export
def test_layers_without_any_cache_are_noted(exports: Path) -> None:
    model = optimize(decoder("cross-layer", "torchscript", exports), RECIPE, assume=ASSUMED).model
    kept = kept_layers(model)
    assert kept is not None
    assert (kept.of, kept.kept) == (LAYERS, (0,))
    assert genai_config(model, "m.onnx", {"max_position_embeddings": 64})["model"]["decoder"]["num_hidden_layers"] == 1


def tied(kind: Any, *, equal: tuple[str, ...]) -> ir.Model:
    """A decoder of two layers in which some weights are equal, and both layers read the same."""
    model = ir.from_proto(tiny_decoders.decoder(kind, rotary=False))
    values = {value.name: value for value in model.graph.initializers.values()}
    for name in equal:
        values[f"{name}1"].const_value = ir.tensor(values[f"{name}0"].const_value.numpy().copy(), name=f"{name}1")
    nodes = {node.outputs[0].name: node for node in model.graph}
    for name in ("k", "v"):
        nodes[f"{name}1"].replace_input_with(0, nodes[f"{name}0"].inputs[0])
    return model


@pytest.mark.parametrize("kind", ["attention", "concat"])
@pytest.mark.parametrize(("equal", "names"), [(("wk", "wv"), 2), (("wv",), 3), (("wk",), 3), ((), 4)])
def test_equal_weights_of_one_input_make_equal_caches(kind: str, equal: tuple[str, ...], names: int) -> None:
    model = tied(kind, equal=equal)
    after = model.clone()
    assert ShareEqualKV()(after).modified == (names < 4)
    interface = kv_interface(after)
    assert interface is not None
    assert len(interface.pairs) == names
    assert interface.problems == ()
    assert verify(model, after).ok
    assert not ShareEqualKV()(after).modified


def test_a_cache_that_only_looks_equal_stays() -> None:
    """The new values are equal, but one cache is scaled before it is given out."""
    model = tied("concat", equal=("wv",))
    present = next(value for value in model.graph.outputs if value.name == "present.1.value")
    node = present.producer()
    assert node is not None
    joined = ir.Value(name="joined", type=present.type, shape=present.shape)
    two = ir.Value(name="two", const_value=ir.tensor(np.float32(2.0), name="two"))
    model.graph.register_initializer(two)
    for user, slot in list(present.uses()):
        user.replace_input_with(slot, joined)
    scaled = ir.node("Mul", [joined, two], outputs=[ir.Value(name="out", type=present.type, shape=present.shape)])
    index = model.graph.outputs.index(present)
    made = ir.node("Concat", list(node.inputs), {"axis": 2}, outputs=[joined])
    model.graph.insert_before(node, made)
    model.graph.insert_before(node, scaled)
    model.graph.outputs[index] = scaled.outputs[0]
    model.graph.remove(node, safe=True)
    scaled.outputs[0].name = "present.1.value"
    assert not ShareEqualKV()(model).modified


def test_verification_finds_caches_that_are_not_equal() -> None:
    """The metadata alone proves nothing."""
    model = tied("attention", equal=("wv",))
    after = model.clone()
    assert ShareEqualKV()(after).modified
    other = tied("attention", equal=())
    verdict = verify(other, after)
    assert not verdict.ok
    del after.metadata_props[EQUAL_KEY]
    with pytest.raises(VerificationError, match="has no input"):
        verify(model, after)


def test_inputs_of_ones_own_must_hold_equal_caches() -> None:
    model = tied("attention", equal=("wv",))
    after = model.clone()
    ShareEqualKV()(after)
    feeds: Arrays = {"input_ids": np.array([[1, 2]]), "attention_mask": np.ones((1, 5), np.int64)}
    rng = np.random.default_rng(0)
    for layer in (0, 1):
        for part in ("key", "value"):
            feeds[f"past_key_values.{layer}.{part}"] = rng.normal(size=(1, 2, 3, 16)).astype(np.float32)
    verdict = verify(model, after, inputs=feeds)
    assert not verdict.ok
    assert "the result takes for equal" in verdict.summary
    feeds["past_key_values.1.value"] = feeds["past_key_values.0.value"]
    assert verify(model, after, inputs=feeds).ok


def test_caches_that_lose_tokens_stay() -> None:
    model = tied("attention", equal=("wv",))
    model.metadata_props["graphopt.importance"] = '{"asked": "asked", "window": 1, "outputs": {}}'
    rule = ShareEqualKV()
    assert not rule(model).modified
    assert [site.detail for site in rule.sites] == ["its cache stays: tokens may be dropped from it (evictable-kv)"]
