"""Judge what the tools made of a decoder with a cache: does it answer alike, how well does it predict, how fast is it?

    python benchmarks/decoder_judge.py request.json result.json

A process of its own beside `attention.py`. The request: `source` (the original), `candidates` (files by tool),
`builder` (the file of onnxruntime-genai's builder, or null), `scored` (names whose perplexity is wanted), `text` (a
JSON file of token ids), `windows` of `window` tokens (each with an empty cache), `prompt` and `steps` (tokens of the
timing), `rounds` (of each sitting; 0: no timing), `threads`.

All files run through graphopt's generator, which shares one buffer between past and present where the graph can. The
builder's file runs so too, and through onnxruntime-genai's own generator.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from decoder_domain import CASES, Sizes, errors
from tools import BUILDER, GENAI
from zoo_judge import SITTINGS, Ratios, size

from graphopt.analysis.interleaved import NO_SPINNING, Interleaved, Ratio
from graphopt.errors import GraphoptError, first_line
from graphopt.runtime_ops.generation import Generator
from graphopt.runtime_ops.memory_session import release_memory
from graphopt.runtime_ops.scoring import perplexity
from graphopt.runtime_ops.session import session

WARMUP_STEPS = 8


def main() -> None:
    """Read the request, write the result."""
    request = json.loads(Path(sys.argv[1]).read_text())
    source = Path(request["source"])
    files = {name: Path(path) for name, path in request["candidates"].items()}
    if request["builder"]:
        files[BUILDER] = Path(request["builder"])
    text = json.loads(Path(request["text"]).read_text())
    original, tools = judge(source, files, text, request)
    # What can't even do this has no time.
    needed = [case.label for case in CASES if case.batch == 1 and case.padding == "none" and case.step != "chunk"]
    runnable = {
        name: path
        for name, path in files.items()
        if "cache" in tools[name] and all(isinstance(tools[name]["errors"][label], float) for label in needed)
    }
    timings = time_all(source, runnable, text[: request["prompt"]], request) if request["rounds"] else []
    if GENAI in (timings[0]["ratios"] if timings else {}):
        tools[GENAI] = dict(tools[BUILDER])
    Path(sys.argv[2]).write_text(json.dumps({"original": original, "tools": tools, "timings": timings}))


def judge(
    source: Path, files: Mapping[str, Path], text: Sequence[int], request: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Sizes, errors over the table of calls, and perplexities: of the original, and by tool."""
    tools: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for name, path in {"original": source, **files}.items():
        tools[name] = {**size(path), "loads": True}
        try:
            calls[name] = Call(session(path, session_options(request["threads"]), ["CPUExecutionProvider"]))
        except GraphoptError as error:
            tools[name] |= {"loads": False, "verdict": _said(error, path)}
    print("calls", flush=True)
    reference = calls.pop("original")
    for name, found in errors(reference, calls, sizes(reference.session)).items():
        tools[name]["errors"] = found
    calls.clear()
    del reference
    release_memory()
    for name, path in {"original": source, **files}.items():
        if not tools[name]["loads"]:
            continue
        try:
            generator = Generator(path, sess_options=session_options(request["threads"]))
        except GraphoptError as error:
            tools[name]["not_generated"] = _said(error, path)
            continue
        tools[name]["cache"] = generator.cache
        if name in request["scored"]:
            print(f"perplexity of {name}", flush=True)
            ids = text[: request["windows"] * request["window"]]
            tools[name]["perplexity"] = perplexity(generator, ids, request["window"]).value
    release_memory()
    return tools.pop("original"), tools


def _said(error: Exception, path: Path) -> str:
    """One line, without the folder, which says nothing of the model."""
    return first_line(error).replace(str(path), path.name)


class Call:
    """A session as a function of inputs by name; inputs that it doesn't have are left out."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session
        self.inputs = {item.name for item in session.get_inputs()}
        self.outputs = [item.name for item in session.get_outputs()]

    def __call__(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        options = onnxruntime.RunOptions()
        options.log_severity_level = 4
        wanted = {name: value for name, value in feeds.items() if name in self.inputs}
        return dict(zip(self.outputs, self.session.run(self.outputs, wanted, options), strict=True))


def sizes(session: onnxruntime.InferenceSession) -> Sizes:
    """Layers, heads, head size and vocabulary of a decoder."""
    keys = [item for item in session.get_inputs() if item.name.endswith(".key")]
    _, heads, _, head_size = keys[0].shape
    return Sizes(len(keys), heads, head_size, session.get_outputs()[0].shape[-1])


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """The defaults, with so many threads that sleep while they wait."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    for key, value in NO_SPINNING.items():
        options.add_session_config_entry(key, value)
    return options


class Session:
    """A file in an ONNX Runtime session, driven by graphopt's generator."""

    def __init__(self, path: Path, prompt: Sequence[int], steps: int, threads: int) -> None:
        self.generator = Generator(path, sess_options=session_options(threads))
        self.prompt = np.array([prompt], np.int64)
        self.steps = steps

    def prefill(self) -> None:
        """Run the prompt with an empty cache, and choose the first token."""
        capacity = self.prompt.shape[1] + self.steps
        self.decoding = self.generator.start(1, capacity)
        logits = self.generator.prefill(self.decoding, self.prompt, chunk=self.prompt.shape[1])
        self.chosen = [int(logits[0].argmax())]

    def decode(self, steps: int | None = None) -> None:
        """Run so many tokens, one at a time, each the most probable one."""
        for _ in range(self.steps if steps is None else steps):
            logits = self.decoding.feed(np.array([self.chosen[-1:]], np.int64))
            self.chosen.append(int(logits[0, -1].argmax()))


class GenAI:
    """The builder's folder in onnxruntime-genai."""

    def __init__(self, path: Path, prompt: Sequence[int], steps: int, threads: int) -> None:
        import onnxruntime_genai as genai

        self.prompt, self.steps = np.array(prompt, np.int32), steps
        length = len(prompt) + steps + 1
        options = {"intra_op_num_threads": threads, **NO_SPINNING}
        config = genai.Config(str(path.parent))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self.model = genai.Model(config)
        self.parameters = genai.GeneratorParams(self.model)
        # An end of text would end the measurement.
        self.parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=1)
        self.generator = genai.Generator(self.model, self.parameters)

    def prefill(self) -> None:
        """As the session's."""
        if self.generator.token_count():
            self.generator.rewind_to(0)
        self.generator.append_tokens(self.prompt)

    def decode(self, steps: int | None = None) -> None:
        """As the session's. The first token comes from the prompt's logits without a run, so it is one call more."""
        for _ in range((self.steps if steps is None else steps) + 1):
            self.generator.generate_next_token()

    @property
    def chosen(self) -> list[int]:
        """The tokens after the prompt."""
        return [int(token) for token in self.generator.get_sequence(0)[len(self.prompt) :]]


def time_all(
    source: Path, files: Mapping[str, Path], prompt: Sequence[int], request: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Ratios to the original of a prompt and of the tokens after it, and of the original against itself."""
    steps, threads = request["steps"], request["threads"]
    names = list(files)
    if BUILDER in files:
        names.append(GENAI)
    work = {f"prefill {len(prompt)}": len(prompt), f"decode {steps}": steps}
    kept = {label: {"cpu": Ratios(names), "wall": Ratios(names)} for label in work}
    agreed: dict[str, int] = {}
    for sitting in range(SITTINGS):
        places = [("original", source), *files.items(), *([(GENAI, files[BUILDER])] if GENAI in names else [])]
        places.append(("control", source))
        runners = {}
        # What is made first in a process finds other memory than what comes later.
        for name, path in places[::-1] if sitting % 2 else places:
            runners[name] = (GenAI if name == GENAI else Session)(path, prompt, steps, threads)
        ordered = [runners[name] for name, _ in places]
        for runner in ordered:
            runner.prefill()
            runner.decode(WARMUP_STEPS)
        measured = [Interleaved([r.prefill for r in ordered]), Interleaved([r.decode for r in ordered])]
        for number in range(request["rounds"]):
            for kind in measured:
                kind.round()
            print(f"sitting {sitting + 1}, round {number + 1}", flush=True)
        for ratios, kind in zip(kept.values(), measured, strict=True):
            for clock, seconds in (("cpu", kind.cpu), ("wall", kind.wall)):
                found = [Ratio.of(times, seconds[0]) for times in seconds]
                ratios[clock].add(float(np.median(seconds[0])) * 1e3, found[-1], found[1:-1])
        agreed = {name: _agreed(runners[name].chosen, runners["original"].chosen) for name in names}
        ordered.clear()
        runners.clear()
        del measured, runner
        release_memory()
    rounds = request["rounds"] * SITTINGS
    return [
        {"workload": label, "tokens": work[label], "rounds": rounds, "agreed": agreed, **both["cpu"].to_dict(),
         "wall": both["wall"].to_dict()}
        for label, both in kept.items()
    ]  # fmt: skip


def _agreed(found: Sequence[int], expected: Sequence[int]) -> int:
    """How many tokens are the same before the first that isn't."""
    same = [a == b for a, b in zip(found, expected, strict=False)]
    return same.index(False) if False in same else len(same)


if __name__ == "__main__":
    main()
