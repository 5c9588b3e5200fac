"""Encoder-decoders as three sources: derived from the module, right in ONNX Runtime, and generating as transformers."""

from __future__ import annotations

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

from tiny_encoder_decoders import TOKENS, WORDS, built  # noqa: E402

from graphopt.export.encoder_decoder import (  # noqa: E402
    FILES,
    encoder_decoder_sources,
    is_encoder_decoder,
)

CACHE = {part: ("batch", 4, dim, 8) for part, dim in (("decoder", "past"), ("encoder", "encoder_sequence"))}


def sources(name: str) -> dict[str, Source]:
    module = built(name)
    assert is_encoder_decoder(module)
    return encoder_decoder_sources(module, module.config, label=name)


def dims(source: Source) -> dict[str, tuple[int | str, ...]]:
    return {item.name: item.dims for item in source.inputs}


def export(module: Any, found: dict[str, Source], folder: Path) -> float:
    """Write all of them; the largest error against PyTorch over their probes."""
    errors = []
    loaded = Loaded("tiny", found, module)
    for name, source in found.items():
        references = run_torch(source)
        outputs = output_dims(source, references)
        traced = trace(source, outputs, "dynamo", 23, folder)
        loaded.fill(traced.model, source)
        path = folder / f"{name}.onnx"
        save(traced.model, path, external_data=False)
        errors += compare(source.label, path, references, list(outputs), traced.warned).values()
    return max(errors)


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


class Generator:
    """Greedy generation by the three files."""

    def __init__(self, folder: Path) -> None:
        self.encoder, self.first, self.later = (ort.InferenceSession(folder / f"{name}.onnx") for name in FILES)

    def __call__(self, encoded: dict[str, Any], prompt: Any, tokens: int) -> Any:
        """`tokens` new ids of each row behind the prompt [batch, length]."""
        states = self._run(self.encoder, encoded)
        mask = states.get("encoder_attention_mask", encoded.get("attention_mask"))
        given = {"encoder_hidden_states": states["last_hidden_state"], "encoder_attention_mask": mask}
        found = self._run(self.first, {**given, "input_ids": prompt})
        cache: dict[str, Any] = {}
        rows = [prompt]
        while True:
            ids = found.pop("logits")[:, -1].argmax(-1)[:, None]
            rows.append(ids)
            if len(rows) > tokens:
                return np.concatenate(rows, 1)
            cache |= {name.replace("present", "past_key_values"): value for name, value in found.items()}
            found = self._run(self.later, {**given, **cache, "input_ids": ids})

    @staticmethod
    def _run(session: Any, feeds: dict[str, Any]) -> dict[str, Any]:
        wanted = [item.name for item in session.get_inputs()]
        names = [item.name for item in session.get_outputs()]
        return dict(zip(names, session.run(None, {name: feeds[name] for name in wanted}), strict=True))


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("t5", (9, 5)),
        ("bart", (6, 11)),
        ("whisper", (40,)),
        ("speech2text", (57,)),
        ("vision", (32,)),
        ("t5gemma", (8,)),
    ],
)
def test_generates_as_transformers(name: str, lengths: tuple[int, ...], tmp_path: Path) -> None:
    """Rows padded at either end; nine tokens, the first by the decoder without a cache, two of them the prompt."""
    module = built(name)
    assert export(module, encoder_decoder_sources(module, module.config, label=name), tmp_path) < 1e-5
    generate = Generator(tmp_path)
    rng = np.random.default_rng(0)
    for length in lengths:
        encoded, prompt = _encoded(module, length, rng), np.array([[1, 7], [1, 8], [1, 9]])
        settings = transformers.GenerationConfig(
            max_new_tokens=9, do_sample=False, num_beams=1, pad_token_id=0, decoder_start_token_id=1
        )
        settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
        module.generation_config = settings
        # Whisper's own asks for a language first.
        expected = transformers.GenerationMixin.generate(
            module,
            **{key: torch.from_numpy(value) for key, value in encoded.items()},
            decoder_input_ids=torch.from_numpy(prompt),
        )
        assert len(np.unique(expected.numpy()[:, 2:])) > 2
        np.testing.assert_array_equal(generate(encoded, prompt, 9), expected.numpy())


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
    return {"input_ids": rng.integers(len(TOKENS), WORDS, (3, length)), "attention_mask": mask}
