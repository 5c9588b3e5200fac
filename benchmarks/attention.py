"""Attention from any exporter: graphopt, its peers and onnxruntime-genai on decoders and encoders, interleaved.

    python benchmarks/attention.py                                all, into docs/attention.md (`make bench-attention`)
    python benchmarks/attention.py --only smollm2-sdpa20 smart-turn    some of it, printed only
    python benchmarks/attention.py --resume                       parts without a result yet, then everything written

SmolLM2 from four exports (made at first, ten minutes in all, and kept): attention operators, nodes, logits over the
table of calls of `decoder_domain.py`, perplexity, speed of a prompt and of the tokens after it. Encoders from several
exporters: as in the zoo, at three shapes. Peers that aren't installed say so (`pip install 'graphopt[zoo]'`). Takes
about 35 minutes on two cores.
"""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import attention_page
from decoder_domain import CASES, TOLERANCE
from tools import BUILDER, GENAI, PEERS, Tool, graphopt_tool
from zoo import ROOT, Tell, ask, collect, environment, judge, write_all
from zoo_models import ENTRIES, Entry

from graphopt.export.dependencies import quiet, require
from graphopt.models.catalogue import fetch
from graphopt.models.texts import wikipedia

SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    "smollm2-sdpa20": ("torch.export, opset 20, sdpa", ("--opset", "20")),
    "smollm2-eager20": ("torch.export, opset 20, eager", ("--opset", "20", "--attention", "eager")),
    "smollm2-sdpa23": ("torch.export, opset 23, sdpa", ("--opset", "23")),
    "smollm2-torchscript": ("TorchScript, opset 17, sdpa", ("--exporter", "torchscript")),
}
"""What each source is, and the options of `export_smollm2.py` that write it."""
GENAI_SOURCE = ("smollm2-genai", ("--exporter", "genai"))
ASSUMED = ("no-left-padding", "no-batched-chunks", "counted-positions", "max-length=8192")
PEER_NAMES = ("ORT transformers", "onnxscript for ORT", "onnxslim")
WINDOW = 512
"""Tokens of one window of the perplexity."""
_GENAI_TOOL = Tool(GENAI, "onnxruntime-genai", ())


def _batches(**sizes: int) -> dict[str, dict[str, int]]:
    """The workloads of batch 1 and 8; the name of the batch's dimension is the first."""
    (batch, _), *rest = sizes.items()
    return {f"batch {n}": {batch: n, **dict(rest)} for n in (1, 8)}


_SEQUENCES = {
    f"{batch}×{length}": {"batch_size": batch, "sequence_length": length}
    for batch, length in ((1, 16), (1, 128), (8, 64))
}
ENCODERS = {key: entry for key, entry in ENTRIES.items() if key.startswith("minilm-")} | {
    key: Entry(key, ENTRIES[key].use, workloads)
    for key, workloads in {
        "paraphrase-minilm": _SEQUENCES,
        "ppocr-v4-rec": _batches(**{"p2o.DynamicDimension.0": 1, "x[2]": 48, "p2o.DynamicDimension.1": 320}),
        "ppocr-v6-rec": _batches(**{"DynamicDimension.0": 1, "DynamicDimension.1": 320}),
        "smart-turn": _batches(s6=1),
    }.items()
}
PARTS = [*SOURCES, *ENCODERS]


def main() -> None:
    """Measure what is asked for, write the page, print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=f"Of {', '.join(PARTS)}."
    )
    parser.add_argument(
        "--tools",
        nargs="*",
        choices=PEER_NAMES,
        default=PEER_NAMES,
        metavar="PEER",
        help=f"Of {', '.join(PEER_NAMES)}.",
    )
    parser.add_argument("--resume", action="store_true", help="Keep the results that are there.")
    parser.add_argument("--keep", action="store_true", help="Keep the files that the tools wrote.")
    parser.add_argument("--recipe", help="graphopt's recipe in place of its default one.")
    parser.add_argument("--rounds", type=int, default=3, help="Rounds of each of two sittings, SmolLM2. Default 3.")
    parser.add_argument("--prompt", type=int, default=512, help="Tokens of the prompt. Default 512.")
    parser.add_argument("--steps", type=int, default=128, help="Tokens after it. Default 128.")
    parser.add_argument("--windows", type=int, default=40, help=f"Windows of {WINDOW} tokens scored. Default 40.")
    parser.add_argument("--seconds", type=float, default=2.0, help="Timing of each encoder's file. Default 2.")
    parser.add_argument("--threads", type=int, default=2, help="Threads of ONNX Runtime. Default 2.")
    parser.add_argument("--timeout", type=float, default=300.0, help="Seconds after which a tool is stopped.")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "attention", help="Where results are kept.")
    parser.add_argument("--sources", type=Path, help="Folder of SmolLM2's exports; default sources/ of --folder.")
    parser.add_argument("--docs", type=Path, help="Folder of the page; default docs/ where all parts run.")
    arguments = parser.parse_args()
    arguments.sources = arguments.sources or arguments.folder / "sources"
    peers = [tool for tool in PEERS if tool.name in arguments.tools]
    tools = [graphopt_tool(recipe=arguments.recipe), graphopt_tool(recipe=arguments.recipe, assume=ASSUMED), *peers]
    parts: dict[str, functools.partial[dict[str, Any]]] = {}
    for key in PARTS:
        if key in arguments.only and key in SOURCES:
            parts[key] = functools.partial(decoder, key, tools, arguments)
        elif key in arguments.only:
            parts[key] = functools.partial(judge, ENCODERS[key], [tools[0], *peers], arguments)
    results = collect(parts, arguments.folder / "results", arguments.resume)
    versions = {tool.name: tool.version for tool in tools}
    data = {
        "environment": environment(arguments.threads),
        "versions": {**versions, BUILDER: _GENAI_TOOL.version, GENAI: _GENAI_TOOL.version},
        "assumed": ASSUMED,
        "windows": arguments.windows,
        "window": WINDOW,
        "not_measured": sorted(set(PARTS) - set(parts)),
        "models": results,
    }
    text = attention_page.page(data)
    complete = len(parts) == len(PARTS) and len(peers) == len(PEER_NAMES) and not arguments.recipe
    if folder := arguments.docs or (ROOT / "docs" if complete else None):
        (folder / "attention.md").write_text(text)
        (folder / "attention.json").write_text(json.dumps(data, indent=1) + "\n")
    print(text)


def decoder(key: str, tools: list[Tool], arguments: argparse.Namespace, tell: Tell) -> dict[str, Any]:
    """Run the tools on one export of SmolLM2, and judge what they wrote."""
    use, options = SOURCES[key]
    tell("exporting")
    source, report = export(key, options, arguments.sources)
    builder, said = None, "not installed"
    if _GENAI_TOOL.version is not None:
        builder, said = export(*GENAI_SOURCE, arguments.sources)
    folder = arguments.folder / key
    found, candidates = write_all(tools, source, folder, arguments.timeout, tell)
    if builder is not None:
        found |= {BUILDER: {}, GENAI: {}}
    scored = ["original", *(tool.name for tool in tools if tool.package == "graphopt")]
    if key == next(iter(SOURCES)):  # the builder's file is the same beside every source
        scored.append(BUILDER)
    request = {
        "source": str(source),
        "candidates": candidates,
        "builder": str(builder) if builder is not None else None,
        "scored": scored,
        "text": str(token_ids(arguments.folder)),
        "window": WINDOW,
        **{name: getattr(arguments, name) for name in ("windows", "prompt", "steps", "rounds", "threads")},
    }
    judged = ask("decoder_judge.py", request, folder, found, tell)
    for name, tool in found.items():
        if "errors" in tool:
            narrow = name in ("graphopt assuming", BUILDER, GENAI)
            rows = 1 if name in (BUILDER, GENAI) else None
            bad = [f"{label} ({error})" for label, error in differing(tool["errors"], narrow, rows).items()]
            tool |= {"equal": not bad, "verdict": f"not alike: {'; '.join(bad)}" if bad else ""}
            if "not_generated" in tool:
                tool["error"] = f"not timed: {tool['not_generated']}"
    if not arguments.keep:
        shutil.rmtree(folder)
    return {"model": key, "use": use, "source": report, "builder": said, **judged, "tools": found}


def differing(errors: dict[str, float | str], narrow: bool, rows: int | None = None) -> dict[str, str]:
    """The calls that aren't answered alike. `narrow`: of those without padding on the left (and of `rows` rows), and
    one that is refused counts for nothing."""
    result = {}
    for case in CASES:
        error = errors[case.label]
        fits = case.padding != "left" and rows in (None, case.batch)
        claimed = not narrow or (fits and not isinstance(error, str))
        if claimed and not (isinstance(error, float) and error <= TOLERANCE):
            result[case.label] = error if isinstance(error, str) else f"{error:.1e}"
    return result


def export(key: str, options: tuple[str, ...], folder: Path) -> tuple[Path, str]:
    """The file of an export, made unless it lies there, and what the script said of it against PyTorch."""
    target = folder / key / "model.onnx"
    log = target.with_name("export.log")
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).with_name("export_smollm2.py")
        command = [sys.executable, str(script), "--output", str(target), *options]
        with log.open("w") as stream:
            subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT)
    lines = log.read_text().splitlines() if log.exists() else []
    if not target.exists():
        raise SystemExit(f"{key} can't be exported: {lines[-1:]}")
    said = [line.replace(str(target), target.name) for line in lines if "logits" in line]
    return target, " ".join(said) or "not checked in this run"


def token_ids(folder: Path) -> Path:
    """The held-out text as token ids of SmolLM2, made once."""
    target = folder / "text.json"
    if not target.exists():
        path = fetch("smollm2")
        with quiet():
            tokenizer = require("transformers").AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
            ids = tokenizer(wikipedia("evaluation"))["input_ids"]
        target.write_text(json.dumps([int(token) for token in ids]))
    return target


if __name__ == "__main__":
    main()
