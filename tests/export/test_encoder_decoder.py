"""Encoder-decoders as three sources: derived from the module, right in ONNX Runtime, and generating as transformers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphopt.errors import UsageError
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

from tiny_encoder_decoders import IMAGE, TOKENS, WORDS, built  # noqa: E402

from graphopt.export.encoder_decoder import (  # noqa: E402
    FILES,
    encoder_decoder_sources,
    is_encoder_decoder,
)

Feeds = Mapping[str, Any]
Run = Callable[[str, Feeds], dict[str, Any]]
"""Runs one of the three parts on inputs by name; outputs by name."""
CACHE = {part: ("batch", 4, dim, 8) for part, dim in (("decoder", "past"), ("encoder", "encoder_sequence"))}


@functools.cache
def sources(name: str) -> dict[str, Source]:
    module = built(name)
    assert is_encoder_decoder(module)
    return encoder_decoder_sources(module, module.config, label=name, image=(32, 32))


def dims(source: Source) -> dict[str, tuple[int | str, ...]]:
    return {item.name: item.dims for item in source.inputs}


class TestSources:
    def test_text(self) -> None:
        found = sources("bart")
        assert list(found) == list(FILES)
        encoder, first, later = found.values()
        text, states = ("batch", "encoder_sequence"), ("batch", "encoder_sequence", 32)
        assert dims(encoder) == {"input_ids": text, "attention_mask": text}
        assert encoder.outputs == ["last_hidden_state"]
        tokens = {"encoder_attention_mask": text, "input_ids": ("batch", "sequence")}
        assert dims(first) == {**tokens, "encoder_hidden_states": states}
        parts = [f"{n}.{half}.{part}" for n in (0, 1) for half in ("decoder", "encoder") for part in ("key", "value")]
        assert first.outputs == ["logits", *(f"present.{part}" for part in parts)]
        assert dims(later) == {**tokens, **{f"past_key_values.{part}": CACHE[part.split(".")[1]] for part in parts}}
        # The keys and values of the encoder's states stay what they are.
        assert later.outputs == ["logits", *(f"present.{part}" for part in parts if "decoder" in part)]
        assert later.dims is not None
        assert later.dims["present.1.decoder.value"] == ("batch", 4, "total", 8)
        # Each has the part that it runs, under the names of the whole.
        names = [{name for name, _ in source.module.inner.named_parameters()} for source in found.values()]
        whole = {name for name, _ in built("bart").named_parameters(remove_duplicate=False)}
        assert all(name.startswith("model.encoder.") for name in names[0])
        assert names[1] == names[2] <= whole
        assert not any(name.startswith("model.encoder.") for name in names[1])

    def test_sound_of_one_length_without_a_mask(self) -> None:
        encoder, first, later = sources("whisper").values()
        assert dims(encoder) == {"input_features": ("batch", 16, 40)}
        assert "encoder_attention_mask" not in {**dims(first), **dims(later)}
        assert dims(later)["past_key_values.0.encoder.value"] == CACHE["encoder"]

    def test_sound_of_any_length_with_a_mask_of_its_frames(self) -> None:
        encoder, first, _ = sources("speech2text").values()
        assert dims(encoder) == {"input_features": ("batch", "frames", 16), "attention_mask": ("batch", "frames")}
        assert dims(first)["encoder_attention_mask"] == ("batch", "frames")
        assert dims(first)["encoder_hidden_states"] == ("batch", "encoder_sequence", 32)

    def test_waveforms_of_which_the_encoder_gives_a_mask(self) -> None:
        encoder, first, _ = sources("moonshine").values()
        assert dims(encoder) == {"input_values": ("batch", "samples"), "attention_mask": ("batch", "samples")}
        assert encoder.outputs == ["last_hidden_state", "encoder_attention_mask"]
        assert dims(first)["encoder_attention_mask"] == ("batch", "encoder_sequence")

    def test_images(self) -> None:
        encoder, first, later = sources("vision").values()
        assert dims(encoder) == {"pixel_values": ("batch", 3, 32, 32)}
        assert list(dims(first)) == ["input_ids", "encoder_hidden_states"]
        assert dims(later)["past_key_values.0.decoder.key"] == ("batch", 4, "past", 6)

    def test_windows_keep_the_whole_past(self) -> None:
        later = sources("t5gemma")["decoder_with_past_model"]
        assert dims(later)["past_key_values.0.decoder.key"] == ("batch", 2, "past", 8)

    @pytest.mark.parametrize("name", ["bart", "moonshine"])
    def test_what_stands_at_padding_is_not_compared(self, name: str) -> None:
        for reference in run_torch(sources(name)["encoder_model"]):
            real = (reference.real or {})["last_hidden_state"]
            mask = reference.feeds["attention_mask"] if name == "bart" else reference.outputs[1]
            assert real is not None
            assert not mask.all()
            np.testing.assert_array_equal(real, np.broadcast_to(mask[..., None] == 1, (*mask.shape, 32)))
        for reference in run_torch(sources(name)["decoder_with_past_model"]):
            assert reference.real is not None
            assert reference.real["logits"] is None

    def test_the_module_is_as_before(self) -> None:
        module = built("bart")
        before = {name: dict(vars(part)) for name, part in module.named_modules()}
        encoder_decoder_sources(module, module.config, label="bart")
        assert {name: dict(vars(part)) for name, part in module.named_modules()} == before

    def test_no_logits(self) -> None:
        module = transformers.T5Model(built("t5").config).eval()
        with pytest.raises(UsageError, match="t5: T5Model gives no logits; export the class with its head"):
            encoder_decoder_sources(module, module.config, label="t5")

    def test_code_that_asks_for_numbers(self) -> None:
        module = built("led")
        with pytest.raises(UsageError, match=r"led: its encoder LEDEncoder doesn't run .*decides by numbers"):
            encoder_decoder_sources(module, module.config, label="led")

    def test_no_image_size(self) -> None:
        module = built("vision")
        vars(module.encoder.config)["image_size"] = None
        with pytest.raises(UsageError, match=r"doesn't tell the size of its images \(image_size\)"):
            encoder_decoder_sources(module, module.config, label="vision")
        found = encoder_decoder_sources(module, module.config, label="vision", image=(32, 32))
        assert dims(found["encoder_model"])["pixel_values"] == ("batch", 3, 32, 32)

    def test_a_decoder_alone_is_none(self) -> None:
        config = transformers.GPT2Config(n_embd=24, n_layer=1, n_head=4, vocab_size=WORDS)
        assert not is_encoder_decoder(transformers.GPT2LMHeadModel(config))


def in_torch(name: str) -> Run:
    found = sources(name)

    def run(part: str, feeds: Feeds) -> dict[str, Any]:
        source = found[part]
        with torch.no_grad():
            made = source.module(*(torch.from_numpy(feeds[item.name]) for item in source.inputs))
        return {output: tensor.numpy() for output, tensor in zip(source.dims or (), made, strict=True)}

    return run


def in_runtime(name: str, folder: Path) -> Run:
    """All files written as an export writes them, and compared with PyTorch over their probes."""
    loaded = Loaded(name, sources(name), built(name))
    sessions = {}
    for part, source in loaded.sources.items():
        references = run_torch(source)
        outputs = output_dims(source, references)
        traced = trace(source, outputs, "dynamo", 23, folder)
        loaded.fill(traced.model, source)
        path = folder / f"{part}.onnx"
        save(traced.model, path, external_data=False)
        assert max(compare(source.label, path, references, list(outputs), traced.warned).values()) < 5e-5
        sessions[part] = ort.InferenceSession(path)

    def run(part: str, feeds: Feeds) -> dict[str, Any]:
        session = sessions[part]
        wanted = {item.name: feeds[item.name] for item in session.get_inputs()}
        return dict(zip([item.name for item in session.get_outputs()], session.run(None, wanted), strict=True))

    return run


def generated(run: Run, encoded: Feeds, prompt: Any, tokens: int) -> Any:
    """`tokens` new ids of each row behind the prompt [batch, length], greedily, by the three parts."""
    states = run("encoder_model", encoded)
    mask = states.get("encoder_attention_mask", encoded.get("attention_mask"))
    given = {"encoder_hidden_states": states["last_hidden_state"], "encoder_attention_mask": mask}
    found = run("decoder_model", {**given, "input_ids": prompt})
    cache: dict[str, Any] = {}
    rows = [prompt]
    while True:
        ids = found.pop("logits")[:, -1].argmax(-1)[:, None]
        rows.append(ids)
        if len(rows) > tokens:
            return np.concatenate(rows, 1)
        # The encoder's part of the cache comes once and stays.
        cache |= {name.replace("present", "past_key_values"): value for name, value in found.items()}
        found = run("decoder_with_past_model", {**given, **cache, "input_ids": ids})


def by_transformers(name: str, encoded: Feeds, prompt: Any, tokens: int) -> Any:
    module = built(name)
    settings = transformers.GenerationConfig(
        max_new_tokens=tokens, do_sample=False, num_beams=1, pad_token_id=0, decoder_start_token_id=1
    )
    settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
    module.generation_config = settings
    # Whisper's own asks for a language first.
    return transformers.GenerationMixin.generate(
        module,
        **{key: torch.from_numpy(value) for key, value in encoded.items()},
        decoder_input_ids=torch.from_numpy(prompt),
    ).numpy()


PROMPT = np.array([[1, 7], [1, 8], [1, 9]])


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("bart", 6),
        ("speech2text", 57),
        ("moonshine", 900),
        ("t5gemma", 8),
        ("switch", 7),
        ("marian", 5),
        ("pix2struct", 9),
        ("vision", 32),
    ],
)
def test_the_parts_generate_as_the_whole(name: str, length: int) -> None:
    encoded = _encoded(built(name), length, np.random.default_rng(0))
    expected = by_transformers(name, encoded, PROMPT, 9)
    np.testing.assert_array_equal(generated(in_torch(name), encoded, PROMPT, 9), expected)


def test_images_beside_text() -> None:
    assert list(sources("florence")) == ["vision_encoder", "embed_tokens", *FILES]
    rng = np.random.default_rng(0)
    pixels = rng.normal(size=(3, 3, 32, 32)).astype(np.float32)
    ids = np.concatenate([np.full((3, 17), IMAGE), rng.integers(9, WORDS, (3, 4))], 1)
    run = in_torch("florence")
    embedded = run("embed_tokens", {"input_ids": ids})["inputs_embeds"]
    features = run("vision_encoder", {"pixel_values": pixels})["image_features"]
    embedded[ids == IMAGE] = features.reshape(-1, features.shape[-1])
    ones = np.ones_like(ids)
    expected = by_transformers(
        "florence", {"input_ids": ids, "attention_mask": ones, "pixel_values": pixels}, PROMPT, 6
    )
    found = generated(run, {"inputs_embeds": embedded, "attention_mask": ones}, PROMPT, 6)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("name", "lengths"), [("t5", (9, 5)), ("whisper", (40,))])
def test_the_files_generate_as_transformers(name: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    """Rows padded at either end; the first token by the decoder without a cache."""
    run = in_runtime(name, tmp_path)
    for length in lengths:
        encoded = _encoded(built(name), length, np.random.default_rng(0))
        expected = by_transformers(name, encoded, PROMPT, 9)
        assert len(np.unique(expected[:, 2:])) > 2
        np.testing.assert_array_equal(generated(run, encoded, PROMPT, 9), expected)


def _encoded(module: Any, length: int, rng: np.random.Generator) -> dict[str, Any]:
    """Three rows of the encoder's inputs; where there is a mask, the first is padded left and the last right."""
    mask = np.ones((3, length), np.int64)
    mask[0, : length // 3] = 0
    mask[2, -(length // 4) :] = 0
    match module.get_encoder().main_input_name:
        case "pixel_values":
            return {"pixel_values": rng.normal(size=(3, 3, length, length)).astype(np.float32)}
        case "input_features" if hasattr(module.config, "input_feat_per_channel"):
            mask[0] = 1  # Its frames end with padding, never begin with it.
            return {
                "input_features": rng.normal(size=(3, length, 16)).astype(np.float32),
                "attention_mask": mask,
            }
        case "input_features":
            return {"input_features": rng.normal(size=(3, 16, length)).astype(np.float32)}
        case "flattened_patches":
            patches = rng.normal(size=(3, length, 50)).astype(np.float32)
            patches[..., :2] = np.arange(1, length + 1)[:, None]
            return {"flattened_patches": patches, "attention_mask": mask}
        case "input_values":
            mask[0] = 1
            return {"input_values": rng.normal(size=(3, length)).astype(np.float32), "attention_mask": mask}
    return {"input_ids": rng.integers(len(TOKENS), WORDS, (3, length)), "attention_mask": mask}
