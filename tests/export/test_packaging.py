"""The files beside an exported model: which they are, and that transformers 4 and 5 read the same in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
from tiny_decoders import decoder

from graphopt.errors import ModelError
from graphopt.export.genai import write_genai_config
from graphopt.export.packaging import (
    carry,
    companions,
    copy_companions,
    make_readable,
    readable_config,
    readable_tokenizer_config,
)
from graphopt.graph.load import load

BESIDE = [
    "chat_template.jinja", "config.json", "generation_config.json", "merges.txt", "preprocessor_config.json",
    "spiece.model", "tokenizer.json", "tokenizer_config.json", "vocab.json",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (*BESIDE, "model.safetensors", "README.md", "modeling_own.py", "training_args.bin"):
        (folder / name).write_text("{}")
    (folder / "tokenizer").mkdir()
    return folder


def test_what_belongs_beside_a_model(folder: Path) -> None:
    assert [path.name for path in companions(folder)] == BESIDE


def test_they_are_copied_and_made_readable(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama", "dtype": "bfloat16"}')
    (folder / "generation_config.json").write_text('{"eos_token_id":\t2}')
    files = copy_companions(folder, target, dtype="float16")
    assert files == [target / name for name in BESIDE]
    assert sorted(path.name for path in target.iterdir()) == BESIDE
    kinds = {"dtype": "float16", "torch_dtype": "float16"}
    assert json.loads((target / "config.json").read_text()) == {"model_type": "llama", **kinds}
    assert (target / "generation_config.json").read_text() == '{"eos_token_id":\t2}'
    assert (folder / "config.json").read_text() == '{"model_type": "llama", "dtype": "bfloat16"}'
    assert copy_companions(target, target) == files  # onto themselves


def test_they_are_carried_to_what_is_made_of_the_model(folder: Path, tmp_path: Path) -> None:
    for kind, place in (("attention", folder), ("group-query", tmp_path / "fast")):
        place.mkdir(exist_ok=True)
        onnx.save(decoder(kind), place / f"{kind}.onnx")
    old, new = folder / "attention.onnx", tmp_path / "fast" / "group-query.onnx"
    assert [path.name for path in carry(old, new)] == BESIDE
    write_genai_config(folder, load(old), old.name, {"max_position_embeddings": 64})
    assert carry(old, new)[-1] == new.parent / "genai_config.json"
    written = json.loads((new.parent / "genai_config.json").read_text())
    assert written["model"]["decoder"]["filename"] == "group-query.onnx"
    assert written["search"]["past_present_share_buffer"]


def test_a_file_that_needs_nothing_keeps_its_bytes(folder: Path) -> None:
    text = '{"torch_dtype":"float32",\n"rope_theta": 10000.0}'
    (folder / "config.json").write_text(text)
    make_readable(folder)
    assert (folder / "config.json").read_text() == text


@pytest.mark.parametrize(
    ("written", "added"),
    [
        ({"dtype": "float32"}, {"torch_dtype": "float32"}),
        ({"torch_dtype": "float32"}, {}),
        ({}, {}),
        ({"rope_parameters": {"rope_theta": 5.0, "rope_type": "default"}}, {"rope_theta": 5.0}),
        (
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "linear", "factor": 2.0}},
            {"rope_theta": 5.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rope_parameters": {"rope_theta": 5.0, "rope_type": "default", "partial_rotary_factor": 0.5}},
            {"rope_theta": 5.0, "partial_rotary_factor": 0.5},
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}, "sliding_attention": {"rope_theta": 6.0}}}, {}),
        ({"rope_parameters": None}, {}),
        ({"quantization_config": {"dtype": "int4"}}, {}),
    ],
)
def test_config_in_the_names_of_both_versions(written: dict[str, Any], added: dict[str, Any]) -> None:
    assert readable_config(written) == {**written, **added}
    assert readable_config(readable_config(written)) == readable_config(written)
    inner = {"model_type": "llama", **written}
    assert readable_config({"text_config": inner}) == {"text_config": {**inner, **added}}


def test_tokenizer_config_in_the_names_of_both_versions() -> None:
    new = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>", "<b>"], "bos_token": "<s>"}
    assert readable_tokenizer_config(new) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "additional_special_tokens": ["<a>", "<b>"],
        "bos_token": "<s>",
    }
    old = {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<image>"}}
    assert readable_tokenizer_config(old) == old


def test_what_isnt_json_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config.json can't be read: Expecting"):
        make_readable(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config.json holds no JSON object$"):
        make_readable(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"can't be copied to .*nowhere: No such file"):
        copy_companions(folder, tmp_path / "nowhere")


@pytest.mark.export
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        (
            "Llama",
            {
                "rope_parameters": {
                    "rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0, "original_max_position_embeddings": 1024,
                }
            },
        ),
        ("GPTNeoX", {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default", "partial_rotary_factor": 0.25}}),
        ("Gemma3Text", {}),
        ("Gemma3", {}),
        ("GPT2", {}),
    ],
)  # fmt: skip
def test_transformers_reads_back_what_it_wrote(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    config = getattr(transformers, f"{kind}Config")(dtype="float16", **options)
    config.save_pretrained(tmp_path)
    make_readable(tmp_path)
    again = transformers.AutoConfig.from_pretrained(tmp_path)
    read, wrote = again.to_dict(), {**config.to_dict(), "_name_or_path": str(tmp_path)}
    assert {key: read.get(key) for key in wrote} == wrote  # the added names of version 4 may stay beside
    assert again.dtype == config.dtype


@pytest.mark.export
def test_transformers_reads_back_its_tokenizer(tmp_path: Path) -> None:
    import tokenizers
    import transformers

    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "<tool>", "a", "b"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    written = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="<s>", eos_token="</s>", unk_token="<unk>", extra_special_tokens=["<tool>"]
    )
    written.save_pretrained(tmp_path)
    make_readable(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = "a b <tool> c </s>"
    assert again(text)["input_ids"] == written(text)["input_ids"]
    assert again.decode(again(text)["input_ids"], skip_special_tokens=True) == written.decode(
        written(text)["input_ids"], skip_special_tokens=True
    )
    assert again.extra_special_tokens == ["<tool>"]
    assert again.model_input_names == written.model_input_names
    assert (again.bos_token, again.eos_token) == ("<s>", "</s>")
