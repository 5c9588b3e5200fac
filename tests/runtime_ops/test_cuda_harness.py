"""The CUDA harness (benchmarks/cuda_operators.py) as far as it goes without a GPU: launchers, their arguments, its table."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cuda_launchers
import cuda_operators
from cuda_case import Call, Case, all_cases, largest_difference
from cuda_launchers import Launcher, Launchers, Unavailable, declared

from graphopt.runtime_ops import library_path, operators

torch = pytest.importorskip("torch")
CASES = list(all_cases())


class Unloaded(Launchers):
    """Launchers of no library; those that only tell a size say that it is nothing."""

    def __init__(self) -> None:
        self.declared = declared()

    def call(self, name: str, arguments: Any, stream: int = 0) -> int:
        self.declared[name].converted(arguments)
        return 0


def test_the_headers_are_understood() -> None:
    launchers = declared()
    found = launchers["graphopt_cuda_hadamard_quantize_half"]
    assert found.result == "int"
    assert found.launches
    assert found.parameters == (
        ("const void*", "x"), ("const float*", "factor"), ("uint8_t*", "y"), ("float*", "scales"), ("int64_t", "tokens"),
        ("int64_t", "groups"), ("int64_t", "halves"), ("int64_t", "m"), ("float", "scale"), ("float", "clip"),
        ("float", "largest"), ("void*", "stream"),
    )  # fmt: skip
    error = launchers["graphopt_cuda_error"]
    assert (error.result, error.launches) == ("const char*", False)


def test_every_launcher_has_cases() -> None:
    launching = {name for name, launcher in declared().items() if launcher.launches}
    assert launching <= {case.launcher for case in CASES}
    assert {case.operator for case in CASES} <= set(operators())
    assert any(case.timed for case in CASES)


@pytest.mark.parametrize("launcher", sorted({case.launcher for case in CASES}))
def test_cases_match_their_launchers(launcher: str) -> None:
    chosen = [case for case in CASES if case.launcher == launcher and not case.timed]
    assert chosen
    for case in chosen[:: -(-len(chosen) // 20)]:
        call = case.make(torch, "cpu", Unloaded())
        declared()[case.launcher].converted(call.arguments)
        expected = call.expected()
        assert [(e.shape, e.dtype) for e in expected] == [(o.shape, o.dtype) for o in call.outputs]
        given = call.arguments.values() if isinstance(call.arguments, dict) else call.arguments
        for output in call.outputs:
            assert any(output is argument for argument in given)
        assert call.bytes >= 0
        for output, want in zip(call.outputs, expected, strict=True):
            output.copy_(want)
        assert largest_difference(call) <= 1


def test_wrong_arguments_are_told() -> None:
    launcher = Launcher(
        "f", "folder", "int", (("const float*", "x"), ("int64_t", "n"), ("float", "s"), ("void*", "stream"))
    )
    x = torch.zeros(2, 3)
    launcher.converted({"x": x, "n": 1, "s": 2.0})
    launcher.converted({"s": 2.0, "n": 1, "x": None})
    launcher.converted([None, 1, 2.0])
    for given, says in (
        ({"x": x, "n": 1}, "f needs its argument s"),
        ([x, 1], "f takes 3 arguments, and is given 2"),
        ({"x": x, "n": 1, "s": 2.0, "t": 1}, "f takes no argument t"),
        ({"x": x, "n": 1.0, "s": 2.0}, "n must be of the type int64_t"),
        ({"x": x, "n": 1, "s": 2}, "s must be of the type float"),
        ({"x": x.t(), "n": 1, "s": 2.0}, "x must be a contiguous tensor"),
    ):
        with pytest.raises(TypeError, match=says):
            launcher.converted(given)


def test_structures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "op").mkdir()
    (tmp_path / "op" / "launchers.h").write_text("""
        struct Sizes {
          const float* x;  // numbers; of them
          int64_t rows, columns;
          float scale;
        };
        GRAPHOPT_LAUNCHER int64_t graphopt_cuda_op_bytes(const Sizes* sizes);
        GRAPHOPT_LAUNCHER int graphopt_cuda_op(const Sizes* sizes, uint8_t* y, void* stream);
    """)
    monkeypatch.setattr(cuda_launchers, "OPERATORS", tmp_path)
    launcher = declared()["graphopt_cuda_op"]
    assert launcher.folder == "op"
    assert launcher.structs["Sizes"] == (
        ("const float*", "x"), ("int64_t", "rows"), ("int64_t", "columns"), ("float", "scale")
    )  # fmt: skip
    x = torch.zeros(2, 3)
    given, y = launcher.converted({"x": x, "rows": 2, "columns": 3, "scale": 0.5, "y": None})
    assert y is None
    made = given._obj
    assert (made.x, made.rows, made.columns, made.scale) == (x.data_ptr(), 2, 3, 0.5)
    with pytest.raises(TypeError, match="needs its argument columns"):
        launcher.converted({"x": x, "rows": 2, "scale": 0.5, "y": None})


def test_what_differs() -> None:
    def off(found: Any, wanted: Any, **allowed: Any) -> float:
        return largest_difference(Call({}, [torch.tensor(found)], lambda: [torch.tensor(wanted)], 0, **allowed))

    nan, inf = float("nan"), float("inf")
    assert off([1.0, nan, inf], [1.0, nan, inf]) == 0
    assert off([1.0], [1.5], atol=1.0) == 0.5
    assert off([1.0], [1.5]) > 1
    assert off([nan], [1.5], atol=1.0) == inf
    assert off([inf], [1.5], atol=1.0) == inf
    assert off([1.0, 2.0], [1.0], atol=1.0) == inf
    assert off([1, 2, 3, 4], [1, 2, 3, 4]) == 0
    assert off([1, 2, 3, 4], [1, 2, 3, 5], steps=1, share=0.25) == 1
    assert off([1, 2, 3, 4], [1, 2, 3, 5], steps=1, share=0.2) == inf
    assert off([1, 2, 3, 4], [1, 2, 3, 6], steps=1, share=0.25) == 2


def test_the_library_has_what_the_headers_declare() -> None:
    path = library_path()
    assert path is not None, "the library with the kernels isn't built"
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "graphopt_cuda_error"):
        pytest.skip("the library was built without CUDA kernels")
    for name in declared():
        assert hasattr(library, name), name


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def gpu() -> None:
        raise Unavailable("There is no GPU: PyTorch sees no CUDA device, and CUDA kernels run on nothing else.")

    monkeypatch.setattr(cuda_operators, "gpu", gpu)
    monkeypatch.setattr(sys, "argv", ["cuda_operators.py"])
    assert cuda_operators.main() == 2
    assert "There is no GPU" in capsys.readouterr().err


def test_the_table() -> None:
    case = Case("Op", "graphopt_cuda_op_half", "1 × 2", lambda *_: Call({}, [], list, 0))
    results = [
        cuda_operators.Result(case, 0.5, 2e-5, (1e-5, "memory")),
        cuda_operators.Result(case, 3.0),
        cuda_operators.Result(case, float("inf"), error="no"),
    ]
    text = cuda_operators.table(results)
    assert "| Op | op_half | 1 × 2 | 20.0 | 10.0 | 50% | memory |" in text
    assert "1 of 3 cases agree with PyTorch." in text
    assert "- WRONG: graphopt_cuda_op_half 1 × 2: 3 times as far off as allowed" in text
    assert "- WRONG: graphopt_cuda_op_half 1 × 2: no" in text


def test_limits() -> None:
    limits = cuda_operators.Limits(100.0, {"float32": 10.0, "float16 tensor": 20.0, "int8 tensor": 40.0})
    assert limits.seconds(Call({}, [], list, 200)) == (2.0, "memory")
    assert limits.seconds(Call({}, [], list, 200, 400, "int8 tensor")) == (10.0, "int8 tensor")
