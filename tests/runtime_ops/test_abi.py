"""The layout of ONNX Runtime's interface that the library goes by is that of an official header."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from graphopt.errors import UsageError
from graphopt.models.packages import PackagedFile, bring

NATIVE = Path(__file__).parents[2] / "graphopt" / "runtime_ops" / "native"

# ONNX Runtime's own packages hold no header; this small one brings that of version 1.17, the oldest supported.
HEADER = PackagedFile(
    "quark/onnx/operators/custom_ops/include/onnxruntime-1.17.0/onnxruntime/core/session/onnxruntime_c_api.h",
    "50dffd48d32043ebc05558bef52551879a3ee919796734458dc60ae83e517c95",
    209174,
)


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


@pytest.fixture(scope="module")
def header() -> Path:
    try:
        return bring("amd-quark", "0.13", [HEADER]) / HEADER.path
    except UsageError as error:
        pytest.skip(f"there is no official header: {error}")


def checked(compiler: str, header: Path, check: Path) -> subprocess.CompletedProcess[str]:
    """The check compiled; a quoted include is looked for beside the file that has it first."""
    command = [compiler, "-std=c++17", "-fsyntax-only", f"-I{header.parent}", f"-I{NATIVE}", str(check)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_slot_is_where_the_official_header_has_it(compiler: str, header: Path) -> None:
    done = checked(compiler, header, NATIVE / "abi_check.cc")
    assert done.returncode == 0, done.stderr


def test_a_slot_in_the_wrong_place_is_found(compiler: str, header: Path, tmp_path: Path) -> None:
    """The check above can fail."""
    text = (NATIVE / "ort_abi.h").read_text()
    (tmp_path / "ort_abi.h").write_text(text.replace("Slot unused_3[23];", "Slot unused_3[24];"))
    done = checked(compiler, header, shutil.copy(NATIVE / "abi_check.cc", tmp_path))
    assert done.returncode != 0
    assert "slot of CreateCustomOpDomain" in done.stderr


def test_all_slots_that_are_used_are_checked() -> None:
    text = (NATIVE / "ort_abi.h").read_text()
    table = text.partition("struct Api {")[2].partition("};")[0]
    slots = text.partition("GRAPHOPT_ORT_SLOTS(X)")[2].partition("#define GRAPHOPT_ORT_CALLBACKS")[0]
    assert sorted(re.findall(r"X\((\w+)\)", slots)) == sorted(re.findall(r"\(\*(\w+)\)\(", table))
