"""Which data set a name means, and the options that go with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from tiny_decoders import decoder

from calibration.small_models import residual
from graphopt.calibration.data import BatchedDataset
from graphopt.calibration.images import ImageFolder
from graphopt.calibration.sources import load_data
from graphopt.calibration.text import TextDataset
from graphopt.errors import InputDataError, UsageError

tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers isn't installed")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "[CLS]": 2, "[SEP]": 3}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_text(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_text("a " * 1500)
    data = load_data(tmp_path / "t.txt", ir.from_proto(decoder("attention")), tokenizer=tokenizer)
    assert isinstance(data, TextDataset)
    assert (len(data), data.window) == (2, 512)
    assert (data.before, data.after) == ((2,), (3,))
    data = load_data(tmp_path / "t.txt", residual(1), tokenizer=tokenizer, samples=3)
    assert isinstance(data, TextDataset)
    assert (len(data), data.window) == (3, 128)
    with pytest.raises(UsageError, match="needs a tokenizer"):
        load_data(tmp_path / "t.txt", residual(1))


def test_other_sources(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((200, 5, 8), np.float32))
    data = load_data(tmp_path / "a.npz", residual(1))
    assert isinstance(data, BatchedDataset)
    assert len(data) == 128
    np.save(tmp_path / "image.npy", np.zeros((4, 4, 3), np.uint8))
    data = load_data(tmp_path, residual(1), images="imagenet")
    assert isinstance(data, ImageFolder)
    data = load_data("self", ir.from_proto(decoder("attention")), samples=2, window=5)
    assert isinstance(data, TextDataset)
    assert data.tokens.shape == (10,)


def test_mistakes(tmp_path: Path) -> None:
    model = residual(1)
    (tmp_path / "a.csv").write_text("1")
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 8), np.float32))
    with pytest.raises(InputDataError, match="no calibration data"):
        load_data(tmp_path / "none.npz", model)
    with pytest.raises(UsageError, match=r"is a \.txt, \.jsonl or \.npz file"):
        load_data(tmp_path / "a.csv", model)
    with pytest.raises(UsageError, match="tokenizer is for text"):
        load_data(tmp_path / "a.npz", model, tokenizer=tmp_path)
    with pytest.raises(UsageError, match="window of tokens is for text"):
        load_data(tmp_path / "a.npz", model, window=4)
    with pytest.raises(UsageError, match="at least one sample"):
        load_data(tmp_path / "a.npz", model, samples=0)
    with pytest.raises(UsageError, match="can't become 'blue'"):
        load_data(tmp_path, model, images="blue")
    with pytest.raises(InputDataError, match="decoder with a KV cache"):
        load_data("self", model)
