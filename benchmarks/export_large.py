"""Write a Llama- or Mixtral-shaped checkpoint with random weights, export it, and say how much memory that took.

The checkpoint is a Hugging Face folder with bfloat16 weights in safetensors shards, written block by block. The export
is a process of its own. Its memory is told in two ways, because pages of a mapped file count as resident although
the system takes them back whenever it needs them: `anonymous` is what the process really holds (RssAnon of
/proc/PID/status, sampled 50 times a second), `resident` the system's own peak, mapped pages included (VmHWM).
The bound is 1.5 times the largest tensor as it is written (experts merged into one), and 500 MB.

    python benchmarks/export_large.py --parameters 1B --folder large                      graphopt export
    python benchmarks/export_large.py --parameters 7B --folder large --dtype float16 --weights-only
    python benchmarks/export_large.py --parameters 3B --experts 8 --folder large --weights-only

`--weights-only` leaves tracing and verification out: only the weights are brought from the checkpoint into an ONNX
file, and compared there with the checkpoint. A checkpoint that the folder has already is used again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HEAD = 128
"""Size of an attention head."""
VOCABULARY = 32000
BLOCK = 1 << 22
"""Numbers drawn and written at once."""
UNITS = {"K": 1e3, "M": 1e6, "B": 1e9}
SPARE = 500_000_000
"""Bytes allowed beside the tensors."""


def main() -> int:
    """Parse the command line, write the checkpoint, export it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=_count, default="1B", help="about this many, such as 350M or 7B")
    parser.add_argument("--tied", action="store_true", help="tie the head to the embedding")
    parser.add_argument("--experts", type=int, default=0, help="a mixture of this many experts in every layer")
    parser.add_argument("--shard-bytes", type=float, default=2e9)
    parser.add_argument("--folder", type=Path, required=True, help="for the checkpoint and, for a while, the export")
    parser.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    parser.add_argument("--weights-only", action="store_true", help="neither trace nor verify")
    parser.add_argument("--keep", action="store_true", help="don't delete the export")
    parser.add_argument("--save-weights", nargs=3, metavar=("FOLDER", "OUTPUT", "DTYPE"), help=argparse.SUPPRESS)
    options, more = parser.parse_known_args()
    if options.save_weights is not None:
        save_weights(Path(options.save_weights[0]), Path(options.save_weights[1]), options.save_weights[2])
        return 0
    config = settings(options.parameters, options.tied, options.experts)
    folder = options.folder / "checkpoint"
    start = time.perf_counter()
    if write(folder, config, int(options.shard_bytes)):
        print(f"{folder}: written in {time.perf_counter() - start:.1f} s")
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    numbers = sum(math.prod(shape) for shape in shapes(config).values())
    print(f"{numbers / 1e9:.2f}e9 parameters, {size / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} shards")
    with tempfile.TemporaryDirectory(prefix="export-", dir=options.folder) as temporary:
        target = Path(temporary)
        if options.weights_only:
            command = [__file__, "--folder", ".", "--save-weights", str(folder), str(target / "model.onnx")]
            command.append(options.dtype)
        else:
            command = ["-m", "graphopt", "export", str(folder), "-o", str(target), "--dtype", options.dtype, *more]
        status, seconds, anonymous, resident = measure([sys.executable, *command])
        written = sum(file.stat().st_size for file in target.iterdir())
        itemsize = 4 if options.dtype == "float32" else 2
        merged = 2 * options.experts * config["hidden_size"] * config["intermediate_size"]
        largest = itemsize * max(merged, *(math.prod(shape) for shape in shapes(config).values()))
        allowed = 1.5 * largest + SPARE
        print(f"{seconds:.1f} s, {written / 1e9:.2f} GB written, the largest tensor {largest / 1e6:.0f} MB")
        print(
            f"peak {anonymous / 1e6:.0f} MB anonymous of {allowed / 1e6:.0f} MB allowed, {resident / 1e6:.0f} MB "
            "resident with the mapped pages of files"
        )
        if options.weights_only and status == 0:
            print(f"{compare(folder, target / 'model.onnx', options.dtype)} weights equal to the checkpoint's")
        if options.keep:
            shutil.copytree(target, options.folder / "exported", dirs_exist_ok=True)
    return status or int(anonymous > allowed)


def _count(text: str) -> float:
    """A number with K, M or B behind it."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    if unit and unit not in UNITS:
        raise argparse.ArgumentTypeError(f"{text} isn't a number with K, M or B behind it")
    return float(number) * UNITS.get(unit, 1)


def settings(parameters: float, tied: bool, experts: int) -> dict[str, Any]:
    """The configuration of a Llama, or a Mixtral, with about this many parameters, as wide as 128 times its layers."""

    def made(layers: int) -> dict[str, Any]:
        hidden = HEAD * layers
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if experts:
            kind = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": experts}
        return {
            **kind,
            "dtype": "bfloat16",
            "hidden_size": hidden,
            "intermediate_size": 256 * math.ceil(8 * hidden / 3 / 256),
            "num_hidden_layers": layers,
            "num_attention_heads": layers,
            "num_key_value_heads": layers,
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": tied,
        }

    def distance(layers: int) -> float:
        return abs(sum(math.prod(shape) for shape in shapes(made(layers)).values()) - parameters)

    return made(min(range(1, 129), key=distance))


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of the checkpoint."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        found |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        experts = config.get("num_local_experts", 0)
        for place in [f"block_sparse_moe.experts.{index}" for index in range(experts)] or ["mlp"]:
            gate, up, down = ("w1", "w3", "w2") if experts else ("gate_proj", "up_proj", "down_proj")
            found |= {f"{prefix}.{place}.{name}.weight": (inner, hidden) for name in (gate, up)}
            found[f"{prefix}.{place}.{down}.weight"] = (hidden, inner)
        if experts:
            found[f"{prefix}.block_sparse_moe.gate.weight"] = (experts, hidden)
        found |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    found["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return found


def write(folder: Path, config: dict[str, Any], shard_bytes: int) -> bool:
    """Write the checkpoint, whole or not at all; False where it is there already."""
    if folder.is_dir():
        if json.loads((folder / "config.json").read_text()) != config:
            raise SystemExit(f"{folder} holds another checkpoint; delete it, or give another folder")
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    for name, shape in shapes(config).items():
        held = sum(2 * math.prod(other) for other in shards[-1].values())
        if shards[-1] and held + 2 * math.prod(shape) > shard_bytes:
            shards.append({})
        shards[-1][name] = shape
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix=".checkpoint-", dir=folder.parent) as temporary:
        places: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            places |= dict.fromkeys(shard, file)
            _write_shard(Path(temporary) / file, shard, rng)
        total = sum(2 * math.prod(shape) for shard in shards for shape in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (Path(temporary) / "model.safetensors.index.json").write_text(json.dumps(index))
        (Path(temporary) / "config.json").write_text(json.dumps(config))
        os.replace(temporary, folder)
        os.mkdir(temporary)  # So that there is something to clean up.
    return True


def _write_shard(path: Path, shard: dict[str, tuple[int, ...]], rng: np.random.Generator) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shard.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shard.values():
            for block in _numbers(shape, rng):
                file.write(block)


def _numbers(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[bytes]:
    """Bytes of bfloat16: ones for a vector, which is a norm's gain, else random between 1/128 and 1/32 and signed."""
    count = math.prod(shape)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        if len(shape) == 1:
            yield np.full(size, 0x3F80, np.uint16).tobytes()
        else:
            bits = np.frombuffer(rng.bytes(2 * size), np.uint16)
            yield ((bits & 0x80FF) | 0x3C00).tobytes()


def measure(command: list[str], **options: Any) -> tuple[int, float, int, int]:
    """Exit status, seconds, and peaks of anonymous and of resident memory in bytes, of a process.

    Args:
        command: Its arguments.
        **options: For `subprocess.Popen`.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, **options)
    anonymous = resident = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:  # It has just ended.
            break
        held = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if "RssAnon" in held:
            anonymous = max(anonymous, 1024 * int(held["RssAnon"].split()[0]))
            resident = max(resident, 1024 * int(held["VmHWM"].split()[0]))
        time.sleep(0.02)
    return process.wait(), time.perf_counter() - start, anonymous, resident


def save_weights(folder: Path, output: Path, dtype: str) -> None:
    """Bring the weights of a checkpoint into an ONNX file whose graph returns one of them."""
    import onnx_ir as ir

    from graphopt.graph.save import save

    weights = _weights(folder, dtype)
    values = [ir.Value(name=name, const_value=weights.tensor(name)) for name in weights.names()]
    node = ir.node("Identity", [values[-1]])
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=values, opset_imports={"": 23}, name="weights")
    save(ir.Model(graph, ir_version=11), output, external_data=True)


def _weights(folder: Path, dtype: str) -> Any:
    import torch
    import transformers

    from graphopt.export.weights import cast, checkpoint_weights

    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))
    return cast(checkpoint_weights(folder, module), dtype)


def compare(folder: Path, path: Path, dtype: str) -> int:
    """How many weights the file has; all of them are those of the checkpoint, bit for bit."""
    from graphopt.graph.load import load

    weights = _weights(folder, dtype)
    found = load(path).graph.initializers
    if set(found) != set(weights.names()):
        raise SystemExit(f"{path} has other weights than the checkpoint")
    for name in weights.names():
        tensor = found[name].const_value
        if tensor is None or tensor.dtype != weights.tensor(name).dtype:
            raise SystemExit(f"{path}: {name} is of another type")
        # As bytes, in which numbers that are none are equal too.
        if tensor.numpy().tobytes() != weights.tensor(name).numpy().tobytes():
            raise SystemExit(f"{path}: {name} is another than in the checkpoint")
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
