"""A part of the attention matrix (benchmarks/attention_matrix.py): attentions of tiny models by both exporters."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import matrix_modules
import matrix_texts
from matrix_judge import Outcome, judge
from matrix_models import MODELS
from matrix_page import page, totals
from matrix_truth import count_sites
from matrix_variants import Variant

SCRIPT, EXPORT = Variant("script", 17, "eager"), Variant("export", 20, "sdpa")
CACHED = Variant("script", 17, "eager", cached=True)
PLAIN, TRACED = Variant("export", 20, ""), Variant("script", 14, "")
CASES = [
    ("llama", EXPORT), ("llama", CACHED), ("gemma2", CACHED), ("gptneox", SCRIPT),
    ("bloom", SCRIPT), ("deepseekv3", CACHED), ("bert", EXPORT), ("bert", SCRIPT), ("t5", SCRIPT), ("swin", SCRIPT), ("vit", EXPORT),
    ("torch:grouped-gather", PLAIN), ("torch:grouped-expand", TRACED), ("torch:mip-adapter", PLAIN), ("torch:edgenext", TRACED),
    ("torch:shvit", TRACED), ("torch:itransformer", TRACED), ("onnx:tf2onnx-bert", Variant("text", 0, "")), ("onnx:keras2onnx", Variant("text", 0, "")),
]  # fmt: skip


def made(key: str, variant: Variant, folder: Path) -> Outcome:
    from matrix_exports import make

    make(MODELS[key], variant, folder)
    return judge(folder / variant.file(key), Outcome(key, variant.name, MODELS[key].sites, MODELS[key].others))


@pytest.mark.export
@pytest.mark.parametrize(("key", "variant"), CASES, ids=[f"{key}-{variant.name}" for key, variant in CASES])
def test_every_attention_is_raised(key: str, variant: Variant, tmp_path: Path) -> None:
    outcome = made(key, variant, tmp_path)
    assert outcome.fault == ""
    assert outcome.wrong == []
    assert (outcome.raised, outcome.left, outcome.missed) == (MODELS[key].sites, {}, 0)


@pytest.mark.export
@pytest.mark.parametrize("key", ["torch:softplus", "torch:relu-squared", "torch:sigmoid", "torch:talking-heads"])
def test_other_functions_of_the_scores_are_seen(key: str, tmp_path: Path) -> None:
    outcome = made(key, TRACED, tmp_path)
    assert (outcome.fault, outcome.wrong, outcome.raised, outcome.unseen) == ("", [], 0, 0)
    assert sum(outcome.left.values()) == 1


@pytest.mark.export
@pytest.mark.parametrize("key", ["torch:linear", "torch:efficient", "mixtral"])
def test_products_without_scores_are_no_attention(key: str, tmp_path: Path) -> None:
    """Experts multiply activations by weights that were chosen, with a SiLU in between."""
    outcome = made(key, SCRIPT if key == "mixtral" else TRACED, tmp_path)
    assert (outcome.fault, outcome.wrong) == ("", [])
    assert outcome.raised + sum(outcome.left.values()) == MODELS[key].sites


@pytest.mark.export
@pytest.mark.parametrize(
    "key", ["llama", "bloom", "deepseekv3", "t5", "debertav2", "swinv2", "detr", "torch:softplus", "torch:linear"]
)
def test_what_runs_agrees_with_the_configuration(key: str) -> None:
    """The count of sites is taken from PyTorch as it runs, and from the configuration."""
    import torch
    from matrix_exports import make_case

    model = MODELS[key]
    case = make_case(model, Variant("export", 20, (model.implementations or ("",))[0]))
    found = count_sites(case.module, [torch.from_numpy(array) for array in case.feeds(case.sample).values()])
    assert found == {"softmax": model.sites - model.fixed, "others": model.others}


def test_the_matrix_is_wide_enough() -> None:
    transformers = [key for key in MODELS if ":" not in key]
    assert len(transformers) >= 60
    assert len([key for key in MODELS if key.startswith("torch:")]) >= 25
    assert matrix_modules.HEADS == 4
    assert all(key in MODELS for key in matrix_texts.TEXTS)


def test_the_page_tells_missed_wrong_and_left() -> None:
    outcomes = [
        Outcome("a", "export-20-sdpa", 2, 0, raised=2),
        Outcome("a", "script-17-eager", 2, 0, raised=1, left={"a reason": 1}),
        Outcome("b", "export-20-sdpa", 2, 0, raised=1, missed=1),
        Outcome("b", "script-17-eager", 2, 0, raised=2, wrong=["batch 1: off by 1.0e-01"]),
        Outcome("c", "export-20-sdpa", 2, 0, fault="not exported: no operator"),
    ]
    assert [outcome.bad for outcome in outcomes] == [False, False, True, True, False]
    told = totals(outcomes)
    assert (told["exports"], told["not exported"], told["raised"], told["left"], told["missed"]) == (4, 1, 6, 1, 1)
    text = page(outcomes, {"a": "a form"})
    assert "| a | a form | 2 | 2/0/0 | 1/1/0 |" in text
    assert "2/0/0 off" in text
    assert "- no operator (1): c export-20-sdpa" in text
