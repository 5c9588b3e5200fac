"""Vision-language models as three sources: derived from the module, right in ONNX Runtime, generating as transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import UsageError
from graphopt.export import layers
from graphopt.export.compare import compare, run_torch
from graphopt.export.exporter import output_dims
from graphopt.export.loaded import Loaded
from graphopt.export.source import Source
from graphopt.export.trace import trace
from graphopt.graph.save import save

pytestmark = pytest.mark.export
torch = pytest.importorskip("torch")
ort = pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")

from tiny_vision_language import IMAGE, TEXT, VISION, WORDS, built  # noqa: E402

from graphopt.export.vision_language import FILES, is_vision_language, vision_language_sources  # noqa: E402

Feeds = Mapping[str, Any]
Run = Callable[[str, Feeds], dict[str, Any]]
"""Runs one of the three parts on inputs by name; outputs by name."""


@functools.cache
def sources(name: str) -> dict[str, Source]:
    module = built(name)
    assert is_vision_language(module)
    return vision_language_sources(module, module.config, label=name)


def dims(source: Source) -> dict[str, tuple[int | str, ...]]:
    return {item.name: item.dims for item in source.inputs}


class TestSources:
    def test_images_of_one_size(self) -> None:
        found = sources("llava")
        assert list(found) == list(FILES)
        vision, embed, decoder = found.values()
        assert dims(vision) == {"pixel_values": ("images", 3, 32, 32)}
        assert vision.dims == {"image_features": ("images", 16, 32)}
        assert dims(embed) == {"input_ids": ("batch", "sequence")}
        assert embed.dims == {"inputs_embeds": ("batch", "sequence", 32)}
        cache = {f"past_key_values.0.{part}": ("batch", 2, "past", 8) for part in ("key", "value")}
        assert dims(decoder) == {
            "inputs_embeds": ("batch", "sequence", 32),
            "attention_mask": ("batch", "total"),
            "position_ids": ("batch", "sequence"),
            **cache,
        }
        present = {f"present.0.{part}": ("batch", 2, "total", 8) for part in ("key", "value")}
        assert decoder.dims == {"logits": ("batch", "sequence", WORDS), **present}
        # Each has the part that it runs, under the names of the whole.
        names = [{name for name, _ in source.module.inner.named_parameters()} for source in found.values()]
        heads = [{name.split(".")[1] if name.startswith("model.") else name for name in part} for part in names]
        assert heads[0] == {"vision_tower", "multi_modal_projector"}
        assert names[1] == {"model.language_model.embed_tokens.weight"}
        assert heads[2] == {"language_model", "lm_head.weight"}

    def test_several_images_a_row_with_a_mask(self) -> None:
        vision = sources("smolvlm")["vision_encoder"]
        assert dims(vision) == {
            "pixel_values": ("batch", "images", 3, 32, 32),
            "pixel_attention_mask": ("batch", "images", 32, 32),
        }
        assert vision.dims == {"image_features": ("image_features_dim_0", 4, 32)}

    def test_images_of_any_size(self) -> None:
        vision, _, decoder = sources("qwen2").values()
        assert dims(vision) == {"pixel_values": ("patches", 96), "image_grid_thw": ("images", 3)}
        assert dims(decoder)["position_ids"] == (3, "batch", "sequence")

    @pytest.mark.parametrize("name", ["gemma3", "paligemma"])
    def test_a_mask_that_depends_on_what_is_an_image(self, name: str) -> None:
        assert dims(sources(name)["decoder_model_merged"])["token_type_ids"] == ("batch", "total")

    def test_the_module_is_as_before(self) -> None:
        module = built("llava")
        before = [(dict(vars(part)), len(part._forward_hooks)) for part in module.modules()]
        vision_language_sources(module, module.config, label="llava")
        assert [(dict(vars(part)), len(part._forward_hooks)) for part in module.modules()] == before

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("qwen3", r"hands its language model more than the features of its images \(deepstack_features\)"),
            ("llava_next", "needs image_sizes for the features of its images, whose numbers decide"),
        ],
    )
    def test_what_cannot_be_parts(self, name: str, message: str) -> None:
        module = built(name)
        with pytest.raises(UsageError, match=f"^{name}: {type(module).__name__} {message}"):
            vision_language_sources(module, module.config, label=name)

    def test_layers_of_the_decoder_come_and_go_beside_those_of_the_vision_part(self) -> None:
        module = transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(
                vision_config=transformers.CLIPVisionConfig(**{**VISION, "num_hidden_layers": 8}),
                text_config=transformers.LlamaConfig(**{**TEXT, "num_hidden_layers": 7}),
                image_token_id=IMAGE,
            )
        ).eval()
        found = vision_language_sources(module, module.config, label="llava")
        decoder = found["decoder_model_merged"]
        assert sum(name.startswith("past_key_values") for name in dims(decoder)) == 2 * 7
        plan = layers.plan(decoder.module)
        assert plan is not None
        with layers.cut(decoder.module, plan):
            fewer = decoder.again() if decoder.again else decoder
        assert sum(name.startswith("past_key_values") for name in dims(fewer)) == 2 * plan.kept

    def test_no_image_size(self) -> None:
        module = built("llava")
        vars(module.config.vision_config)["image_size"] = None
        with pytest.raises(UsageError, match=r"doesn't tell the size of its images \(image_size\)"):
            vision_language_sources(module, module.config, label="llava")


# ---- generation


def in_torch(name: str) -> Run:
    found = sources(name)

    def run(part: str, feeds: Feeds) -> dict[str, Any]:
        source = found[part]
        with torch.no_grad():
            made = source.module(*(torch.from_numpy(feeds[item.name]) for item in source.inputs))
        return {output: tensor.numpy() for output, tensor in zip(source.dims or (), made, strict=True)}

    return run


def in_runtime(name: str, parts: Sequence[str], folder: Path) -> Run:
    """These parts written as an export writes them, and compared with PyTorch over their probes; the rest in torch."""
    loaded = Loaded(name, sources(name), built(name))
    sessions = {}
    for part in parts:
        source = loaded.sources[part]
        references = run_torch(source)
        outputs = output_dims(source, references)
        traced = trace(source, outputs, "dynamo", 23, folder)
        loaded.fill(traced.model, source)
        path = folder / f"{part}.onnx"
        save(traced.model, path, external_data=False)
        assert max(compare(source.label, path, references, list(outputs), traced.warned).values()) < 5e-5
        sessions[part] = ort.InferenceSession(path)
    others = in_torch(name)

    def run(part: str, feeds: Feeds) -> dict[str, Any]:
        if part not in sessions:
            return others(part, feeds)
        session = sessions[part]
        wanted = {item.name: feeds[item.name] for item in session.get_inputs()}
        return dict(zip([item.name for item in session.get_outputs()], session.run(None, wanted), strict=True))

    return run


def generated(name: str, run: Run, encoded: Feeds, tokens: int) -> Any:
    """`tokens` new ids of each row of the prompt encoded["input_ids"], greedily, by the three parts."""
    ids, mask = encoded["input_ids"], encoded["attention_mask"]
    embedded = run("embed_tokens", {"input_ids": ids})["inputs_embeds"]
    features = run("vision_encoder", encoded)["image_features"]
    embedded[ids == IMAGE] = features.reshape(-1, features.shape[-1])
    positions, last = places(name, encoded)
    types = encoded.get("token_type_ids", np.zeros_like(ids))
    cache: dict[str, Any] = {}
    rows = [ids]
    while True:
        batch = len(ids)
        cache = cache or {f"past_key_values.{n}.{p}": EMPTY[:batch] for n in range(2) for p in ("key", "value")}
        feeds = {"inputs_embeds": embedded, "attention_mask": mask, "position_ids": positions, "token_type_ids": types}
        found = run("decoder_model_merged", {**feeds, **cache})
        new = found.pop("logits")[:, -1].argmax(-1)[:, None]
        rows.append(new)
        if len(rows) > tokens:
            return np.concatenate(rows, 1)
        cache = {key.replace("present", "past_key_values"): value for key, value in found.items()}
        embedded = run("embed_tokens", {"input_ids": new})["inputs_embeds"]
        mask = np.concatenate([mask, np.ones_like(new)], 1)
        # PaliGemma takes what is written for text, which sees what is before it; for Gemma 3 it's no image.
        types = np.concatenate([types, np.full_like(new, name == "paligemma")], 1)
        last = last + 1
        positions = np.broadcast_to(last[:, None], (*positions.shape[:-1], 1)).copy()


EMPTY = np.zeros((8, 2, 0, 8), np.float32)


def places(name: str, encoded: Feeds) -> tuple[Any, Any]:
    """position_ids of a prompt, and the last position of each row."""
    if name.startswith("qwen"):
        given = {key: torch.from_numpy(encoded[key]) for key in ("input_ids", "attention_mask", "image_grid_thw")}
        kinds = torch.from_numpy((encoded["input_ids"] == IMAGE).astype(np.int32))
        positions, _ = built(name).model.get_rope_index(**given, mm_token_type_ids=kinds)
        positions = np.maximum(positions.numpy(), 0)
        return positions, positions.max((0, 2))
    # PaliGemma counts from 1.
    positions = np.maximum(encoded["attention_mask"].cumsum(1) - 1, 0) + (name == "paligemma")
    return positions, positions[:, -1]


def encoded(name: str) -> dict[str, Any]:
    """Two rows with an image each (SmolVLM: two, of which one is padded), the second row padded at its left."""
    rng = np.random.default_rng(0)
    tokens = {"llava": (16, 16), "paligemma": (16, 16), "qwen2": (6, 9), "qwen2_5": (6, 9), "smolvlm": (8, 8)}
    counts = tokens.get(name, (4, 4))
    rows = [[*rng.integers(9, WORDS, 3), *[IMAGE] * count, *rng.integers(9, WORDS, 4)] for count in counts]
    length = max(map(len, rows)) + 2
    ids = np.array([[0] * (length - len(row)) + row for row in rows], np.int64)
    if name == "paligemma":  # It counts padding among its positions.
        ids = ids[:, 2:]
    made = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}
    if name.startswith("qwen"):
        grid = np.array([[1, 4, 6], [1, 6, 6]])
        made |= {"image_grid_thw": grid, "pixel_values": rng.normal(size=(60, 96)).astype(np.float32)}
        made["mm_token_type_ids"] = (ids == IMAGE).astype(np.int32)
        return made
    several = (2, 2) if name == "smolvlm" else (2,)
    made["pixel_values"] = rng.normal(size=(*several, 3, 32, 32)).astype(np.float32)
    if name == "smolvlm":
        mask = np.ones((2, 2, 32, 32), bool)
        mask[0, 1, 16:] = False
        made["pixel_attention_mask"] = mask
    if name in ("gemma3", "paligemma"):
        made["token_type_ids"] = (ids == IMAGE).astype(np.int64) if name == "gemma3" else np.zeros_like(ids)
    return made


def by_transformers(name: str, given: Feeds, tokens: int) -> Any:
    module = built(name)
    module.generation_config = transformers.GenerationConfig(max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return module.generate(**{key: torch.from_numpy(value) for key, value in given.items()}).numpy()


@pytest.mark.parametrize("name", ["llava", "smolvlm", "qwen2", "qwen2_5", "gemma3", "paligemma", "internvl"])
def test_the_parts_generate_as_the_whole(name: str) -> None:
    given = encoded(name)
    expected = by_transformers(name, given, 8)
    np.testing.assert_array_equal(generated(name, in_torch(name), given, 8), expected)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llava", ("vision_encoder", "embed_tokens")),
        ("smolvlm", ("vision_encoder",)),
        ("qwen2", FILES),
        ("gemma3", ("decoder_model_merged",)),
    ],
)
def test_the_files_generate_as_transformers(name: str, parts: Sequence[str], tmp_path: Path) -> None:
    given = encoded(name)
    expected = by_transformers(name, given, 8)
    assert len(np.unique(expected[:, -8:])) > 1
    np.testing.assert_array_equal(generated(name, in_runtime(name, parts, tmp_path), given, 8), expected)
