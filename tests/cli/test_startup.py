"""What a run of the command doesn't import, and that what is postponed still works."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import onnx

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> { i = Identity(x)  a = Mul(i, w)  y = Tanh(a) }"""

HEAVY = ("sympy.core", "torch", "transformers", "onnxruntime", "onnxscript", "onnx.reference", "networkx", "scipy")


def _python(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_optimize_imports_nothing_heavy(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(TEXT), tmp_path / "m.onnx")
    code = (
        "import sys, graphopt.cli\n"
        "sys.argv = ['graphopt', 'optimize', sys.argv[1], '--verify', 'none', '--json']\n"
        "try:\n    graphopt.cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('loaded', [m for m in {HEAVY!r} if m in sys.modules])"
    )
    assert _python(code, tmp_path / "m.onnx").splitlines()[-1] == "loaded []"
    assert (tmp_path / "m.opt.onnx").is_file()


def test_what_is_postponed_comes_when_it_is_asked_for() -> None:
    code = (
        "from graphopt.cli.startup import prepare\nprepare()\nprepare()\n"
        "import sys, onnx_ir\nassert 'sympy.core' not in sys.modules\n"
        "print((onnx_ir.SymbolicDim('n') + 1).evaluate({'n': 2}))\n"
        "import sympy.printing\nfrom sympy import Symbol\nprint(Symbol('x') * 2)"
    )
    assert _python(code).split() == ["3", "2*x"]
