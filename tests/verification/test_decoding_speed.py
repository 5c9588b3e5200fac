"""Timing decoders in turn."""

from __future__ import annotations

import json

import numpy as np
import pytest

from graphopt.errors import UsageError
from graphopt.verification.decoding_speed import benchmark_decoding


class Scripted:
    """Writes down what it is asked for; the most probable token is the number of tokens so far."""

    cache = "growing"

    def __init__(self, name: str, log: list) -> None:
        self.name, self.log, self.length = name, log, 0

    def start(self, batch: int, capacity: int) -> Scripted:
        self.log.append((self.name, "start", batch, capacity))
        self.length = 0
        return self

    def prefill(self, decoding: Scripted, ids: np.ndarray) -> np.ndarray:
        return decoding.feed(ids)[:, -1]

    def feed(self, ids: np.ndarray) -> np.ndarray:
        self.log.append((self.name, ids.tolist()))
        self.length += ids.shape[1]
        logits = np.zeros((*ids.shape, 50))
        logits[..., self.length] = 1
        return logits


def test_each_reads_the_prompt_and_goes_on_with_its_own_tokens() -> None:
    log: list = []
    decoders = [Scripted(name, log) for name in ("a", "b")]
    done = []
    result = benchmark_decoding(
        decoders,
        Scripted("c", log),
        np.array([[7, 8, 9], [4, 5, 6]]),
        new_tokens=2,
        runs=3,
        progress=lambda *call: done.append(call),
    )
    own = [entry[1:] for entry in log if entry[0] == "b"]
    assert own == 4 * [("start", 2, 5), ([[7, 8, 9], [4, 5, 6]],), ([[3], [3]],), ([[4], [4]],)]
    firsts = [entry[0] for entry in log if entry[1] == "start"]
    assert sorted(firsts) == sorted(4 * "abc")
    assert len({tuple(firsts[i : i + 3]) for i in range(0, 12, 3)}) > 1  # in another order every time
    data = json.loads(json.dumps(result.to_dict()))
    assert [m["name"] for m in data["models"]] == ["a", "b"]
    assert data["control"]["name"] == "a (control)"
    assert data["models"][0]["prefill_ratio"]["median"] == data["models"][0]["decode_cpu_ratio"]["median"] == 1
    assert done[-1] == ("generating", 3, 3)


def test_bad_requests() -> None:
    decoder, prompts = Scripted("a", []), np.array([[1]])
    for decoders, ids, new, runs in (
        ([], prompts, 1, 1),
        ([decoder], prompts[:, :0], 1, 1),
        ([decoder], prompts, 0, 1),
        ([decoder], prompts, 1, 0),
    ):
        with pytest.raises(UsageError, match="at least one decoder"):
            benchmark_decoding(decoders, decoder, ids, new, runs)
