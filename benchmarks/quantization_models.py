"""Second part of `quantization.py`: an encoder and vision models with integer weights and activations.

Each model is judged by what it is for, on data that nothing was calibrated with, beside ONNX Runtime's own quantizer.
CPU time is a ratio to the original's, interleaved, on one thread unless told otherwise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from quantization_make import read_feeds
from quantization_variants import make, recipe_of, run, size
from timed_session import timed_options
from zoo_models import ENTRIES

from graphopt.analysis.interleaved import Interleaved, Ratio
from graphopt.errors import GraphoptError
from graphopt.graph.load import load
from graphopt.models import fashion
from graphopt.models.catalogue import fetch
from graphopt.models.pictures import photographs, text_lines
from graphopt.models.texts import Split, wikipedia
from graphopt.runtime_ops.session import session
from graphopt.verification.quality.classification import ClassificationMeasure
from graphopt.verification.quality.detection import DetectionMeasure
from graphopt.verification.quality.embedding import EmbeddingMeasure
from graphopt.verification.quality.metrics import Metric
from graphopt.verification.quality.recognition import RecognitionMeasure
from graphopt.verification.quality.runs import Measure, judge
from graphopt.verification.quality.tasks import guess_task

Feeds = dict[str, npt.NDArray[Any]]
OPSET = 17
"""That which ONNX Runtime's quantizer gets; older ones have no scales for each channel."""
ORIGINAL = "as it is"
PEER = "ONNX Runtime's quantizer"
SHOWN = {
    "spearman": "Spearman", "accuracy": "top-1", "top1": "same class", "score": "score agreement",
    "score_error": "largest score error", "iou": "overlap of boxes", "detections": "detections of both", "cer": "CER",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Way:
    """One row of a model.

    Attributes:
        name: What it is called.
        recipe: The recipe; None: ONNX Runtime's quantizer.
        options: Options over those of the recipe.
    """

    name: str
    recipe: str | None
    options: dict[str, Any] | None = None


STATIC, DYNAMIC = Way("int8-static", "int8-static"), Way("int8-dynamic", "int8-dynamic")
SMOOTH = Way("smooth-quant+int8-static", "smooth-quant+int8-static")
NARROW = (Way("w4a8", "w4a8"), Way("w4a4", "w4a4"))


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with its data.

    Attributes:
        name: What it is called.
        file: Brings its file; gets the folder for graphs.
        batches: The feeds of a split, a batch each.
        measure: What judges it; gets the file.
        ways: How it is quantized.
        peer: How ONNX Runtime's quantizer does it.
        rule: What the measured ratio and quality are held against, in words.
    """

    name: str
    file: Callable[[Path], Path]
    batches: Callable[[Split, Path], list[Feeds]]
    measure: Callable[[Path], Callable[[], Measure]]
    ways: tuple[Way, ...]
    peer: str
    rule: str


# ---- the data


def sentences(split: Split, file: Path) -> list[Feeds]:
    """Sentences in batches of one length each, so that nothing is padded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(fetch("minilm") / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    texts = [s.strip() for s in re.split(r"(?<=[.!?])\s+|\n+", wikipedia(split)) if 30 < len(s.strip()) < 400]
    chosen = np.random.default_rng(0).permutation(len(texts))[:240]
    names = {value.name for value in load(file).graph.inputs}
    found = []
    for index in chosen.tolist():
        ids = np.asarray([tokenizer.encode(texts[index]).ids], np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        found.append({name: array for name, array in feeds.items() if name in names})
    return found


def lines(split: Split, file: Path) -> list[Feeds]:
    """Rendered lines as PP-OCR's recognisers take them, one at a time: their widths differ."""
    name = load(file).graph.inputs[0].name or ""
    pictures = [picture for _, picture in text_lines(split, 120 if split == "evaluation" else 40)]
    return [{name: ((p.astype(np.float32) / 255 - 0.5) / 0.5).transpose(2, 0, 1)[None]} for p in pictures]


def nsfw_pictures(split: Split, file: Path) -> list[Feeds]:
    """Photographs as open-nsfw's ResNet-50 takes them: BGR less the means, channels last."""
    pictures = photographs(split, 224, 48 if split == "evaluation" else 32)
    shifted = pictures[..., ::-1].astype(np.float32) - np.array([104, 117, 123], np.float32)
    return [{"input:0": one[None]} for one in shifted]


def detector_pictures(split: Split, file: Path) -> list[Feeds]:
    """Photographs as YOLOv8n takes them: RGB from 0 to 1, channels first."""
    pictures = photographs(split, 320, 32 if split == "evaluation" else 24)
    scaled = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), np.float32) / 255
    return [{"images": one[None]} for one in scaled]


def clothes(split: Split, file: Path) -> list[Feeds]:
    """Pictures of Fashion-MNIST; those of the test split where something is judged."""
    pixels, _ = fashion.images("test" if split == "evaluation" else "train", None if split == "evaluation" else 512)
    return [{"image": pixels[start : start + 64]} for start in range(0, len(pixels), 64)]


# ---- what judges them


def _embedding(file: Path) -> Callable[[], Measure]:
    guess = guess_task(load(file), "embedding")
    return lambda: EmbeddingMeasure(str(guess.output), guess.mask)


def _recognition(file: Path) -> Callable[[], Measure]:
    guess = guess_task(load(file), "recognition")
    truths = [text for text, _ in text_lines("evaluation", 120)]
    return lambda: RecognitionMeasure(str(guess.output), guess.characters, truths, ignore_spaces=True)


def _classification(labels: Callable[[], npt.NDArray[np.int64]] | None) -> Callable[[Path], Callable[[], Measure]]:
    def made(file: Path) -> Callable[[], Measure]:
        output = load(file).graph.outputs[0].name or ""
        known = None if labels is None else labels()
        return lambda: ClassificationMeasure(output, known)

    return made


def _detection(file: Path) -> Callable[[], Measure]:
    classes = guess_task(load(file)).classes
    return lambda: DetectionMeasure(classes=classes)


def _fashion(kind: fashion.Kind) -> Case:
    return Case(
        f"Fashion-MNIST {kind}",
        lambda work: fashion.model(kind, progress=print),
        clothes,
        _classification(lambda: fashion.images("test")[1]),
        (STATIC, *NARROW) if kind == "cnn" else (DYNAMIC, STATIC, SMOOTH, *NARROW),
        "static",
        "W8A8 within 0.2 points of top-1, W4A8 within 0.5, W4A4 within 1",
    )


CASES = (
    Case(
        "MiniLM", lambda work: ENTRIES["minilm-torch-export-sdpa"].path(work), sentences, _embedding,
        (DYNAMIC, STATIC), "dynamic", "time at most 0.48, Spearman at least 0.995",
    ),
    Case(
        "PP-OCR v4 recogniser", lambda work: fetch("ppocr-v4-rec"), lines, _recognition, (STATIC,), "static",
        "the original's CER",
    ),
    Case(
        "ResNet-50", lambda work: fetch("open-nsfw"), nsfw_pictures, _classification(None), (STATIC,), "static",
        "time at most 0.5, score agreement at least 0.99",
    ),
    Case(
        "YOLOv8n", lambda work: fetch("yolov8n"), detector_pictures, _detection, (STATIC,), "static",
        "time at most 0.55, score agreement at least 0.99",
    ),
    _fashion("cnn"),
    _fashion("vit"),
    _fashion("vit-deep"),
)  # fmt: skip


# ---- measuring


def measure(options: argparse.Namespace) -> list[str]:
    """Measure what is missing; returns the lines of the tables."""
    kept = options.work / "models.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if options.resume and kept.exists() else {}
    text = [
        "CPU time is a ratio to the file as it is, on one thread; quality is on data that nothing was calibrated with."
    ]
    for case in CASES:
        chosen = not options.only or any(word.lower() in case.name.lower() for word in options.only)
        if chosen and case.name not in results:
            try:
                results[case.name] = measured(case, options)
            except GraphoptError as error:
                results[case.name] = {"missing": str(error)}
                print(f"{case.name} is left out: {error}", flush=True)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(json.dumps(results, indent=1))
        if case.name in results:
            text += table(case, results[case.name])
    return text


def measured(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """The rows of one model."""
    work = options.work / "models" / case.name.replace(" ", "-").lower()
    work.mkdir(parents=True, exist_ok=True)
    source = case.file(work)
    calibration = case.batches("calibration", source)
    stored = save_feeds(calibration, work / "calibration")
    files = {ORIGINAL: source}
    missing: dict[str, str] = {}
    for way in (*case.ways, Way(PEER, None)):
        target = work / re.sub(r"\W+", "-", way.name.lower()) / "model.onnx"
        try:
            if not target.exists():
                if way.recipe is None:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    run([sys.executable, __file__, case.peer, str(source), str(target), str(stored)], options.threads)
                else:
                    recipe = recipe_of(way.recipe, None, way.options)
                    made = make(source, target, recipe, data={"feeds": str(stored)}, threads=options.threads)
                    for reason, count in made["left"].items():
                        print(f"{case.name}, {way.name}: left {count}: {reason}", flush=True)
            session(target, timed_options(1))
            files[way.name] = target
        except GraphoptError as error:
            shutil.rmtree(target.parent, ignore_errors=True)
            missing[way.name] = str(error)
            print(f"{case.name}, {way.name} is left out: {error}", flush=True)
    batches = case.batches("evaluation", source)
    names = [name for name in files if name != ORIGINAL]
    found = judge(source, [files[name] for name in names], batches, case.measure(source), threads=options.threads)
    times = timed(files, batches, options.rounds)
    rows: dict[str, Any] = {ORIGINAL: {"bytes": size(source), "time": None, "metrics": {}}}
    for name, quality in zip(names, found, strict=True):
        ratio = times[name]
        rows[name] = {"bytes": size(files[name]), "time": [ratio.median, ratio.uncertainty], "metrics": {}}
        for metric in quality.metrics:
            rows[name]["metrics"][metric.name] = shown(metric, metric.value)
            if metric.reference is not None:
                rows[ORIGINAL]["metrics"][metric.name] = shown(metric, metric.reference)
        print(f"{case.name}, {name}: {rows[name]}", flush=True)
    return {"rows": rows, "missing": missing, "samples": found[0].samples if found else ""}


def save_feeds(batches: Sequence[Feeds], folder: Path) -> Path:
    """Write calibration feeds, a file each: their shapes differ."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for index, feeds in enumerate(batches):
        np.savez(folder / f"{index:04}.npz", **{name.replace("/", "|"): array for name, array in feeds.items()})
    return folder


def timed(files: dict[str, Path], batches: Sequence[Feeds], rounds: int) -> dict[str, Ratio]:
    """Ratios of CPU time to the original's, over some of the batches."""
    sessions = [session(file, timed_options(1)) for file in files.values()]
    chosen = batches[: min(4, len(batches))]

    def runner(one: Any) -> Callable[[], None]:
        return lambda: [one.run(None, feeds) for feeds in chosen] and None

    interleaved = Interleaved([runner(one) for one in sessions])
    interleaved.round(keep=False)
    begin = time.perf_counter()
    for _ in range(max(rounds, 1)):
        interleaved.round()
        if time.perf_counter() - begin > 120:
            break
    return {name: Ratio.of(series, interleaved.cpu[0]) for name, series in zip(files, interleaved.cpu, strict=True)}


def shown(metric: Metric, value: float) -> str:
    """A number as the tables have it."""
    if metric.scale == "share" and metric.name != "score":
        return f"{value:.2%}"
    return f"{value:.4f}"


def table(case: Case, result: dict[str, Any]) -> list[str]:
    """The table of one model."""
    text = ["", f"**{case.name}** (counts: {case.rule})", ""]
    if "missing" in result and "rows" not in result:
        return [*text, f"Left out: {result['missing']}"]
    rows = result["rows"]
    names = [name for name in SHOWN if any(name in row["metrics"] for row in rows.values())]
    text += [f"| file | MB | CPU time | {' | '.join(SHOWN[name] for name in names)} |", "|---" * (3 + len(names)) + "|"]
    for name, row in rows.items():
        ratio = "1" if row["time"] is None else f"{row['time'][0]:.2f} ± {row['time'][1]:.2f}"
        cells = [row["metrics"].get(metric, "") for metric in names]
        text.append(f"| {name} | {row['bytes'] / 1e6:.3g} | {ratio} | {' | '.join(cells)} |")
    text += [f"\nOver {result['samples']}."]
    return text + [f"\n{name} is left out: {reason}" for name, reason in result["missing"].items()]


# ---- ONNX Runtime's quantizer, in a process of its own


def peer(kind: str, source: str, target: str, folder: str) -> None:
    """int8 weights per channel; activations measured on the calibration data or on the fly."""
    import onnx
    import onnx.version_converter
    from onnxruntime import quantization as ort

    prepared = str(Path(target).with_name("prepared.onnx"))
    model = onnx.load(source)
    if next(entry.version for entry in model.opset_import if not entry.domain) < OPSET:
        model = onnx.version_converter.convert_version(model, OPSET)
    onnx.save(model, prepared)
    # Shapes with names that it can't relate end its symbolic inference.
    ort.quant_pre_process(prepared, prepared, skip_symbolic_shape=True)

    if kind == "dynamic":
        ort.quantize_dynamic(prepared, target, per_channel=True, weight_type=ort.QuantType.QInt8)
        Path(prepared).unlink()
        return

    class Reader(ort.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.files = iter(sorted(Path(folder).glob("*.npz")))

        def get_next(self) -> Feeds | None:
            file = next(self.files, None)
            return None if file is None else read_feeds(file)

    ort.quantize_static(
        prepared, target, Reader(), per_channel=True, activation_type=ort.QuantType.QUInt8,
        weight_type=ort.QuantType.QInt8,
    )  # fmt: skip
    Path(prepared).unlink()


def main() -> int:
    """The process: dynamic or static, a source, a target, the folder of the calibration data."""
    kind, source, target, folder = sys.argv[1:]
    peer(kind, source, target, folder)
    print("{}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
