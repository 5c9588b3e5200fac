"""genai_config.json: what the graph says, against the keys that onnxruntime-genai 0.18 reads, and run there if it can."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from exactness import parse
from tiny_decoders import HEADS, KV_HEADS, SIZE, VOCABULARY, decoder

from graphopt import Generator
from graphopt.errors import ModelError, UsageError
from graphopt.export.genai import genai_config, update_genai_config, write_genai_config
from graphopt.graph.assumptions import Reliance, note
from graphopt.graph.last_logits import last_logits
from graphopt.graph.load import load
from graphopt.graph.save import save

CONFIG = {
    "max_position_embeddings": 64,
    "num_attention_heads": HEADS,
    "hidden_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SCHEMA: dict[str, Any] = {
    "model": {
        "type": str,
        "context_length": int,
        "bos_token_id": int,
        "eos_token_id": (int, list),
        "pad_token_id": int,
        "vocab_size": int,
        "decoder": {
            "filename": str,
            "head_size": int,
            "hidden_size": int,
            "num_attention_heads": int,
            "num_hidden_layers": int,
            "num_key_value_heads": int,
            "session_options": {"log_id": str, "provider_options": list},
            "inputs": {
                "input_ids": str,
                "attention_mask": str,
                "position_ids": str,
                "past_key_names": str,
                "past_value_names": str,
            },
            "outputs": {"logits": str, "present_key_names": str, "present_value_names": str},
        },
    },
    "search": {
        "diversity_penalty": float,
        "do_sample": bool,
        "early_stopping": bool,
        "length_penalty": float,
        "max_length": int,
        "min_length": int,
        "no_repeat_ngram_size": int,
        "num_beams": int,
        "num_return_sequences": int,
        "past_present_share_buffer": bool,
        "repetition_penalty": float,
        "temperature": float,
        "top_k": int,
        "top_p": float,
    },
}
"""The keys that the model builder of onnxruntime-genai 0.18 writes for a decoder on the CPU, with their types. The
runtime refuses a key that it doesn't know."""

OPTIONAL = ("attention_mask", "position_ids", "bos_token_id", "eos_token_id", "pad_token_id")


def assert_schema(found: dict[str, Any], schema: dict[str, Any] = SCHEMA) -> None:
    assert set(found) <= set(schema)
    assert set(schema) - set(found) <= set(OPTIONAL)
    for key, value in found.items():
        if isinstance(schema[key], dict):
            assert_schema(value, schema[key])
        else:
            assert isinstance(value, schema[key]), key
            assert type(value) is not bool or schema[key] is bool, key


def made(kind: str = "attention", **options: Any) -> ir.Model:
    return ir.from_proto(decoder(kind, **options))


@pytest.mark.parametrize("kind", ["group-query", "attention", "concat"])
def test_the_graph_is_described(kind: str) -> None:
    positions = kind != "group-query"
    found = genai_config(made(kind, positions=positions), "model.onnx", CONFIG)
    assert_schema(found)
    names = {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"}
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask", **names}
    assert found["model"]["decoder"]["inputs"] == inputs | ({"position_ids": "position_ids"} if positions else {})
    assert found["model"]["decoder"]["outputs"] == {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    sizes = {"head_size": SIZE, "num_key_value_heads": KV_HEADS, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    assert sizes.items() <= found["model"]["decoder"].items()
    assert found["model"]["type"] == "decoder"
    assert found["model"]["vocab_size"] == VOCABULARY
    assert found["model"]["context_length"] == found["search"]["max_length"] == 64
    assert found["search"]["past_present_share_buffer"] == (kind == "group-query")


def test_other_names_become_a_format() -> None:
    found = genai_config(made(names="in{}{} out{}{}"), "m.onnx", CONFIG)["model"]["decoder"]
    assert found["inputs"]["past_key_names"] == "in%dkey"
    assert found["outputs"]["present_value_names"] == "out%dvalue"
    assert found["filename"] == "m.onnx"
    many = genai_config(made(layers=11), "model.onnx", CONFIG)["model"]["decoder"]
    assert many["inputs"]["past_key_names"] == "past_key_values.%d.key"
    model = made()
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.name = (value.name or "").replace(".1.", ".4.")
    gaps = genai_config(model, "model.onnx", CONFIG)["model"]["decoder"]
    assert gaps["inputs"]["past_key_names"] == "past_key_values.%d.key"
    model.graph.inputs[-1].name = "last"
    with pytest.raises(
        ModelError, match=r"here the first is 'past_key_values.0.value'; rename them with `graphopt opt"
    ):
        genai_config(model, "model.onnx", CONFIG)


def test_tokens_and_search_of_the_generation_configuration() -> None:
    generation = SimpleNamespace(
        eos_token_id=[7, 8, VOCABULARY],
        pad_token_id=None,
        do_sample=True,
        temperature=0.6,
        top_k=None,
        top_p=1,
        early_stopping="never",
    )
    found = genai_config(made(), "model.onnx", SimpleNamespace(**CONFIG), generation)
    assert_schema(found)
    tokens = {"bos_token_id": 1, "eos_token_id": [7, 8], "pad_token_id": 7}
    assert tokens.items() <= found["model"].items()
    search = {"do_sample": True, "temperature": 0.6, "top_k": 50, "top_p": 1.0, "early_stopping": True}
    assert search.items() <= found["search"].items()
    plain = genai_config(made(), "model.onnx", {"max_position_embeddings": 64})
    assert_schema(plain)
    assert not {"bos_token_id", "eos_token_id", "pad_token_id"} & set(plain["model"])
    assert plain["model"]["decoder"]["hidden_size"] == KV_HEADS * SIZE


def test_the_length_of_the_context(tmp_path: Path) -> None:
    model = made()
    unlimited = {**CONFIG, "max_position_embeddings": 10**30}
    with pytest.raises(UsageError, match="how many tokens the model takes"):
        genai_config(model, "model.onnx", unlimited)
    for limit in (10**30, 128):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": limit}))
        if limit == 128:
            written = write_genai_config(tmp_path, model, "model.onnx", unlimited)
            assert json.loads(written.read_text())["search"]["max_length"] == 128
        else:
            with pytest.raises(UsageError, match="how many tokens the model takes"):
                write_genai_config(tmp_path, model, "model.onnx", unlimited)
    assert genai_config(model, "model.onnx", unlimited, context_length=100)["search"]["max_length"] == 100
    note(model, Reliance("max-length=32", {"mask": "attention_mask"}, "the table is that long", "a-pass"))
    assert genai_config(model, "model.onnx", CONFIG)["model"]["context_length"] == 32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kind": "concat", "layout": "BSHD"},
            r"the cache 'past_key_values.0.key' isn't \[batch, heads, past, head size\]",
        ),
        ({"names": "past_{}_{} present_{}_{}", "extra": "flag"}, "nothing would fill its inputs flag"),
        (
            {"positions": True, "retyped": "position_ids"},
            "attention mask and position ids must both be int64, or both int32",
        ),
    ],
)
def test_what_the_runtime_cant_run_is_refused(options: dict[str, Any], message: str) -> None:
    extra, retyped = options.pop("extra", None), options.pop("retyped", None)
    model = made(**{"kind": "attention", **options})
    if extra:
        model.graph.inputs.append(ir.Value(name=extra, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1])))
    for value in model.graph.inputs:
        if value.name == retyped:
            value.dtype = ir.DataType.INT32
    with pytest.raises(ModelError, match=f"onnxruntime-genai can't run the model: {message}"):
        genai_config(model, "model.onnx", CONFIG)


def test_a_model_without_a_cache_is_refused() -> None:
    model = parse('<ir_version: 10, opset_import: ["": 23]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
    with pytest.raises(ModelError, match="runs decoders with a KV cache, and the model has none"):
        genai_config(model, "model.onnx", CONFIG)


def test_the_file_of_a_model_that_was_lowered(tmp_path: Path) -> None:
    (tmp_path / "lowered").mkdir()
    old = write_genai_config(tmp_path, made("attention", positions=True), "model.onnx", CONFIG, {"temperature": 0.5})
    assert old == tmp_path / "genai_config.json"
    lowered = made("group-query")
    note(lowered, Reliance("max-length=32", {"mask": "attention_mask"}, "the table is that long", "a-pass"))
    new = update_genai_config(tmp_path / "lowered", lowered, "small.onnx", old)
    before, after = json.loads(old.read_text()), json.loads(new.read_text())
    assert_schema(after)
    assert after["model"]["decoder"].pop("filename") == "small.onnx"
    assert after["model"].pop("context_length") == after["search"].pop("max_length") == 32
    assert after["search"].pop("past_present_share_buffer")
    assert not before["search"].pop("past_present_share_buffer")
    del before["model"]["decoder"]["filename"], before["model"]["decoder"]["inputs"]["position_ids"]
    del before["model"]["context_length"], before["search"]["max_length"]
    assert after == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["genai_config.json", "lowered"]
    old.write_text("{}")
    with pytest.raises(ModelError, match=r"genai_config.json can't be used as a genai_config.json"):
        update_genai_config(tmp_path / "lowered", lowered, "model.onnx", old)
    with pytest.raises(ModelError, match="can't be written"):
        write_genai_config(tmp_path / "nowhere", lowered, "model.onnx", CONFIG)


@pytest.mark.parametrize("last", [False, True], ids=["all", "last"])
@pytest.mark.parametrize("kind", ["group-query", "attention", "concat"])
def test_onnxruntime_genai_writes_the_same_text(kind: str, last: bool, tmp_path: Path) -> None:
    if importlib.util.find_spec("onnxruntime_genai") is None:
        pytest.skip(
            "onnxruntime-genai isn't installed (pip install 'graphopt[zoo]'); docs/serving.md says what it showed"
        )
    import onnxruntime_genai

    onnx.save(decoder(kind, positions=kind != "group-query"), tmp_path / "model.onnx")
    model = load(tmp_path / "model.onnx")
    if last:
        last_logits(model)
        save(model, tmp_path / "model.onnx", in_place=True)
    write_genai_config(tmp_path, model, "model.onnx", {"max_position_embeddings": 64})
    prompt = [3, 5, 8, 13, 21]
    runtime = onnxruntime_genai.Model(str(tmp_path))
    parameters = onnxruntime_genai.GeneratorParams(runtime)
    parameters.set_search_options(max_length=len(prompt) + 12)
    generator = onnxruntime_genai.Generator(runtime, parameters)
    generator.append_tokens(prompt)
    found = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    assert [found] == Generator(tmp_path / "model.onnx").generate([prompt], max_new_tokens=12)
