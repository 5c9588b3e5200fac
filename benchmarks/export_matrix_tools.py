"""The exporters of the export matrix, each a function from a Hugging Face folder to ONNX files in another folder.

Each is used as its documentation has it, with what it offers for dynamic shapes and a cache. `own` isn't an exporter:
it tells what the transformers of an older exporter makes of a folder.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import export_matrix_models
import numpy as np
from export_matrix_models import ANSWER, GENERATING, answer, load
from matrix_models import MODELS, feeds

TOOLS = ("graphopt", "torch", "transformers", "optimum")
_TRACING = ("torch.export", "torch.onnx", "onnx", "onnxscript.function_libs.torch_lib.ops", "networkx")
_LIBRARIES = {
    "graphopt": (*_TRACING, "onnxruntime", "graphopt.export"),
    "torch": (*_TRACING, "matrix_exports"),
    "transformers": (*_TRACING, "matrix_exports", "transformers.exporters.exporter_onnx"),
    "optimum": ("onnxruntime", "optimum.exporters.onnx"),
    "own": (),
}


def prepare(name: str) -> None:
    """Import the libraries of an exporter, those too that it would import late."""
    export_matrix_models.prepare(name)
    for module in _LIBRARIES[name]:
        importlib.import_module(module)


def graphopt(key: str, folder: str, output: str) -> dict[str, Any]:
    """graphopt itself; its time includes its verification against PyTorch."""
    from graphopt.export import export_report

    del key
    report = export_report(folder, output)
    return {"notes": list(report.notes)}


def torch(key: str, folder: str, output: str) -> dict[str, Any]:
    """torch.onnx.export (torch.export) around the module, with its cache as tensors that a DynamicCache is made of.

    An encoder-decoder is exported as it is called without a cache.
    """
    from matrix_exports import case_of, export
    from matrix_variants import Variant

    module = load(folder)
    if module._can_set_experts_implementation():
        # Its usual one counts tokens by expert with an operator that the exporter hasn't.
        module.set_experts_implementation("batched_mm")
    model = MODELS[key]
    case = case_of(model, module, model.kind == "decoder")
    Path(output).mkdir(parents=True, exist_ok=True)
    export(case, Variant("export", 0, ""), Path(output) / "model.onnx")
    return {}


def transformers(key: str, folder: str, output: str) -> dict[str, Any]:
    """transformers' own exporter: prefill and a decode of several tokens where the model generates."""
    import torch as pytorch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter
    from transformers.exporters.utils import decompose_prefill_decode

    model = MODELS[key]
    module = load(folder)
    exporter, config = OnnxExporter(), OnnxConfig(dynamic=True)
    given = {name: pytorch.from_numpy(array) for name, array in feeds(model, 2, 6).items()}
    if model.kind == "decoder":
        # MPT's configuration says no, unless it's told otherwise.
        module.config.use_cache = module.generation_config.use_cache = True
        given["attention_mask"][0, :2] = 0
        made = exporter.export_for_generation(module, given, config, multi_token_decode=True)
        made.save_pretrained(output)
    elif model.kind in GENERATING:
        # Its one call for all of it leaves out the encoder of text, and takes that of sound apart.
        ours = {name: tensor for name, tensor in given.items() if not name.startswith("decoder_")}
        encoder = module.get_encoder()
        exporter.export(encoder, dict(ours), config).save_pretrained(Path(output) / "encoder")
        # Several tokens: a prompt of one would be taken for the only length.
        prompt = {**ours, "decoder_input_ids": given["decoder_input_ids"]}
        stages = decompose_prefill_decode(module, prompt, multi_token_decode=True)
        for name, (part, inputs) in stages.items():
            exporter.export(part, inputs, config).save_pretrained(Path(output) / name)
    else:
        exporter.export(module, given, config).save_pretrained(output)
    return {}


def optimum(key: str, folder: str, output: str) -> dict[str, Any]:
    """optimum-onnx; its time includes its validation against PyTorch."""
    from optimum.exporters.onnx import main_export

    tasks = {
        "decoder": "text-generation-with-past",
        "seq2seq": "text2text-generation-with-past",
        "spectrogram": "automatic-speech-recognition-with-past",
    }
    # It needs a transformers of before 5, which doesn't find the rotary settings where 5 writes them.
    kind = MODELS[key].kind
    # It takes half a minute of sound where it isn't told how much the model takes.
    sizes = {"nb_max_frames": feeds(MODELS[key], 1)["input_features"].shape[-1]} if kind == "spectrogram" else {}
    main_export(f"{folder}-v4", output, task=tasks.get(kind, "feature-extraction"), **sizes)
    return {}


def own(key: str, folder: str) -> float:
    """How far this interpreter's transformers is from the answer that lies in a folder, relative to its largest number.

    An older transformers may read a checkpoint otherwise, and then no exporter of it can be right.
    """
    del key
    arrays = dict(np.load(Path(f"{folder}-v4") / "probe.npz"))
    expected = arrays.pop(ANSWER)
    found = answer(load(f"{folder}-v4"), arrays)
    return float(np.abs(found - expected).max() / np.abs(expected).max())
