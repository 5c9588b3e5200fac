"""Peers of `quantization.py` on the same off-grid weights: ONNX Runtime's quantizers, onnxruntime-genai, llama.cpp.

Each gets the weights in its own form: ONNX Runtime's quantizers the float graph that graphopt wrote, the builder of
onnxruntime-genai a PyTorch module, llama.cpp a GGUF file of float32 numbers, which its own quantizer reads.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from export_smollm2 import build, load_module
from gguf_speed import GenAI, LlamaCpp
from quantization_variants import Setting, Variant, run

from graphopt.analysis.algebra import is_op
from graphopt.analysis.attention_sites import attention_sites
from graphopt.analysis.linear_sites import linear_sites
from graphopt.analysis.shapes import infer
from graphopt.errors import GraphoptError, ModelError, UsageError
from graphopt.graph.edits import nodes
from graphopt.graph.load import load
from graphopt.models.catalogue import fetch
from graphopt.runtime_ops.generation import Generator

ORT_RTN, ORT_RTN_ASYMMETRIC, ORT_HQQ = "ORT RTN", "ORT RTN asymmetric", "ORT HQQ"
GENAI = "onnxruntime-genai int4"
LLAMA = ("llama.cpp Q4_0", "llama.cpp Q4_1")
_FILE_TYPES = {"llama.cpp Q4_0": 2, "llama.cpp Q4_1": 3}
_GGUF = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "gate": "ffn_gate", "up": "ffn_up",
    "down": "ffn_down",
}  # fmt: skip
_TORCH = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip

PEERS = (
    *(
        Variant(name, "peer", Setting(4, group))
        for group in (32, 128)
        for name in (ORT_RTN, ORT_RTN_ASYMMETRIC, ORT_HQQ)
    ),
    Variant(GENAI, "peer", Setting(4, 32)),
    *(Variant(name, "peer", Setting(4, 32)) for name in LLAMA),
)


def make_peer(variant: Variant, target: Path, off_grid: Path, optimized: Path, threads: int) -> dict[str, Any]:
    """Write a peer's file; returns what is known of the making, as `quantization_variants.make` does.

    Args:
        variant: One of `PEERS`.
        target: The file to write.
        off_grid: The off-grid model as `graphopt.models.off_grid` wrote it.
        optimized: The float graph that graphopt made of it.
        threads: Threads of the process.

    Raises:
        GraphoptError: The peer isn't installed, or fails.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    assert variant.setting is not None
    if variant.method in (ORT_RTN, ORT_RTN_ASYMMETRIC, ORT_HQQ):
        arguments = [variant.method, str(optimized), str(target), str(variant.setting.group)]
        return run([sys.executable, __file__, *arguments], threads)
    begin = time.perf_counter()
    if variant.method == GENAI:
        module = load_module("sdpa")
        _into_module(module, off_grid)
        build(module, target, "int4")
    else:
        _quantized_gguf(off_grid, target, _FILE_TYPES[variant.method], threads)
    return {"seconds": time.perf_counter() - begin, "peak": 0, "left": {}}


def scorer(variant: Variant, file: Path, threads: int) -> Path | Generator:
    """What judges a peer's file: the file, or a generator around its runtime."""
    return ScoredLlama(file, threads) if variant.method in LLAMA else file


def system(variant: Variant, file: Path, threads: int) -> Any:
    """What is timed, in the peer's own loop where it has one."""
    if variant.method == GENAI:
        return GenAI(file, threads, False)
    if variant.method in LLAMA:
        return LlamaCpp(file, threads)
    return Generator(file, threads=threads)


class ScoredLlama(Generator):
    """llama.cpp in the place of a generator, as far as a judge of texts asks: it starts, and is fed."""

    def __init__(self, path: Path, threads: int) -> None:
        # Nothing of the base is set up: it would open an ONNX file.
        try:
            self._llama = LlamaCpp(path, threads, every=True)
        except (ImportError, OSError, ValueError) as error:  # its library may be missing or be another one
            raise UsageError(f"llama-cpp-python isn't there: {error}.") from error
        self.name = str(path)

    def start(self, batch: int, capacity: int) -> Any:
        """An empty cache."""
        return self._llama.start(batch, capacity)


# ---- the weights of the off-grid model by layer and role


def _weights(path: Path) -> dict[tuple[int, str], npt.NDArray[np.float32]]:
    """The linear layers' weights [outputs, inputs] by layer and role; of the embedding and last gain by layer -1."""
    model = load(path)
    found: dict[tuple[int, str], npt.NDArray[np.float32]] = {}
    counts: dict[str, int] = {}
    for site in linear_sites(model, attention_sites(model, infer(model, believe_names=True))):
        tensor = site.weight.const_value
        if tensor is None or (site.role not in _TORCH and site.role != "embed"):
            continue
        array = tensor.numpy()
        if site.role == "embed":
            found[-1, "embed"] = array
            continue
        layer = counts[site.role] = counts.get(site.role, -1) + 1
        found[layer, site.role] = array.T if site.orientation == "in,out" else array
    norms = [node for node in nodes(model) if is_op(node, "RMSNormalization")]
    gain = norms[-1].inputs[1].const_value if norms and norms[-1].inputs[1] is not None else None
    if gain is None or len(set(counts.values())) != 1 or len(counts) != len(_TORCH):
        raise ModelError(f"{path} isn't the off-grid model of a llama-like decoder.")
    found[-1, "norm"] = gain.numpy()
    return found


def _into_module(module: Any, path: Path) -> None:
    """Write the weights into a module of `export_smollm2.load_module`."""
    import torch

    weights = _weights(path)
    parameters = dict(module.model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if "layernorm" in name:
                parameter.fill_(1.0)
        for (layer, role), array in weights.items():
            if layer < 0:
                name = "model.embed_tokens.weight" if role == "embed" else "model.norm.weight"
            else:
                name = f"model.layers.{layer}.{_TORCH[role]}.weight"
            parameters[name].copy_(torch.from_numpy(np.array(array)))


def _quantized_gguf(path: Path, target: Path, file_type: int, threads: int) -> None:
    """Write the weights as GGUF and let llama.cpp quantize them."""
    try:
        import llama_cpp
    except (ImportError, OSError) as error:
        raise UsageError(f"llama-cpp-python isn't there: {error}.") from error
    plain = target.parent.parent / "off-grid-f32.gguf"
    if not plain.exists():
        _write_gguf(path, plain)
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = file_type, threads
    code = llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), options)
    if code:
        raise GraphoptError(f"llama.cpp's quantizer fails on {plain} with code {code}.")


def _write_gguf(path: Path, target: Path) -> None:
    """The GGUF file that SmolLM2 came from, with the weights of the off-grid model as float32."""
    import gguf

    reader = gguf.GGUFReader(fetch("smollm2"))
    weights = _weights(path)
    heads = {
        role: int(reader.fields[f"llama.attention.head_count{suffix}"].contents())
        for role, suffix in (("q", ""), ("k", "_kv"))
    }
    writer = gguf.GGUFWriter(target.with_suffix(".part"), "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = 0 if name == "general.file_type" else field.contents()
        writer.add_key_value(name, value, field.types[0], sub_type=inner)
    roles = {name: role for role, name in _GGUF.items()}
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] == "token_embd":
            array = weights[-1, "embed"]
        elif parts[0] == "output_norm":
            array = weights[-1, "norm"]
        elif parts[2] in roles:
            array = weights[int(parts[1]), roles[parts[2]]]
            if (count := heads.get(roles[parts[2]])) is not None:
                # llama.cpp rotates neighbours where others rotate halves.
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        else:
            array = np.ones(tensor.shape[0], np.float32)
        writer.add_tensor(tensor.name, np.ascontiguousarray(array, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.with_suffix(".part").rename(target)


# ---- ONNX Runtime's quantizers, in a process of their own


def _ort(method: str, source: str, target: str, group: int) -> None:
    """MatMulNBits of 4 bits in place of every MatMul, written with external data."""
    import onnx
    from onnxruntime.quantization import matmul_nbits_quantizer as ort

    configurations: dict[str, Callable[[], Any]] = {
        ORT_RTN: lambda: ort.DefaultWeightOnlyQuantConfig(group, True, 4, bits=4),
        ORT_RTN_ASYMMETRIC: lambda: ort.DefaultWeightOnlyQuantConfig(group, False, 4, bits=4),
        ORT_HQQ: lambda: ort.HQQWeightOnlyQuantConfig(group, bits=4),
    }
    quantizer = ort.MatMulNBitsQuantizer(
        onnx.load(source), 4, group, accuracy_level=4, algo_config=configurations[method]()
    )
    quantizer.process()
    quantizer.model.save_model_to_file(target, use_external_data_format=True)


def main() -> int:
    """The process: a method, a source, a target, a group size."""
    method, source, target, group = sys.argv[1:]
    try:
        _ort(method, source, target, int(group))
    except ImportError as error:
        print(f"{method} needs a package that isn't installed: {error}", file=sys.stderr)
        return 1
    print("{}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
