"""The benchmark of encoders with fewer layers (benchmarks/depth_encoders.py): names, tables and plot; nothing is run."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import depth_encoders
from depth_encoders import GREEDY, SERIES, SUBJECTS, Encoder, key


def test_a_variant_has_one_name_however_it_was_found() -> None:
    assert key(["attention.10", "attention.2"], "none") == key(["attention.2", "attention.10"], "none")
    assert key(["10", "9"], "linear") == "9, 10, healed (linear)"


def test_what_was_measured_is_shown(tmp_path: Path) -> None:
    for subject in SUBJECTS:
        empty = Encoder(subject, tmp_path, 1, 1)
        assert (empty.table(), empty.plot()) == ([], None)
        folder = empty.work
        folder.mkdir()
        counts = subject.counts["block"]
        sets = {"block": {series: {str(n): [str(i) for i in range(n)] for n in counts} for series, _ in SERIES}}
        row = {"bytes": 500_000, "metrics": {subject.metric: 0.8125}, "time": [0.5, 0.01]}
        rows = {"0": row, depth_encoders.ORIGINAL: {"bytes": 1_000_000, "reference": 0.9}}
        (folder / "rows.json").write_text(json.dumps({"sets": sets, "rows": rows, "samples": "60 samples"}))
        encoder = Encoder(subject, tmp_path, 1, 1)
        found = encoder.row("block", GREEDY, "none", 1)
        assert found == row
        assert encoder.row("attention", GREEDY, "none", 1) is None
        text = "\n".join(encoder.table())
        assert "60 samples" in text
        assert ("81.25%" if subject.metric == "accuracy" else "0.8125") in text
        assert "| bytes of the file | 50.0% |" in text
        plot = encoder.plot()
        assert plot is not None
        ET.fromstring(plot)
