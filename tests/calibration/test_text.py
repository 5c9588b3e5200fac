"""Calibration text: windows of tokens, and one sentence for each fault of the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphopt.calibration.text import load_text
from graphopt.errors import InputDataError, UsageError

tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers isn't installed")


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    vocabulary = {"[UNK]": 0, "a": 1, "b": 2, "c": 3}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_windows(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.txt").write_text("a b c a b c a b")
    data = load_text(tmp_path / "t.txt", tokenizer, window=3)
    assert [w.tolist() for w in data] == [[[1, 2, 3]], [[1, 2, 3]]]
    assert len(data) == 2


def test_truncation_and_padding_of_the_tokenizer_are_for_inputs_not_for_a_text(tmp_path: Path, tokenizer: Path) -> None:
    loaded = tokenizers.Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    loaded.enable_truncation(4)
    loaded.enable_padding(length=4)
    loaded.save(str(tokenizer / "tokenizer.json"))
    (tmp_path / "t.txt").write_text("a b c a b c a b")
    assert len(load_text(tmp_path / "t.txt", tokenizer, window=3).tokens) == 8
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(InputDataError, match="holds 1 tokens"):
        load_text(tmp_path / "short.txt", tokenizer, window=3)


def test_json_lines(tmp_path: Path, tokenizer: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a b"}\n\n{"prompt": "c"}\n')
    assert load_text(tmp_path / "t.jsonl", tokenizer, window=3).tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("t.txt", "a b", "holds 2 tokens"),
        ("t.jsonl", "{", "Line 1 of .* isn't JSON"),
        ("t.jsonl", '{"other": 1}', "Line 1 of .* has no string"),
    ],
)
def test_faults(tmp_path: Path, tokenizer: Path, name: str, content: str, says: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputDataError, match=says):
        load_text(tmp_path / name, tokenizer, window=3)


def test_missing(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(InputDataError, match="can't be read"):
        load_text(tmp_path / "none.txt", tokenizer)
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(InputDataError, match="no tokenizer at"):
        load_text(tmp_path / "t.txt", tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="needs a tokenizer"):
        load_text(tmp_path / "t.txt", None)
