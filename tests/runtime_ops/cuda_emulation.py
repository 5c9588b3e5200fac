"""CUDA kernels compiled for the host: launchers that take arrays, for machines without a GPU."""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared_files import made_once

HERE = Path(__file__).parent / "cuda_on_host"
OPERATORS = Path(__file__).parents[2] / "graphopt" / "runtime_ops"
_LAUNCH = re.compile(r"([\w:]+(?:<[^;{}<>]*>)?)<<<(.*?)>>>\(", re.DOTALL)
_DYNAMIC = re.compile(r"extern __shared__ (?:__align__\(\d+\) )?(\w+) (\w+)\[\];")


def for_host(source: str) -> str:
    """A .cu file as C++: launches as calls, dynamic shared memory as a pointer."""
    called = _LAUNCH.sub(r"on_host::launch(\1, \2)(", source)
    return _DYNAMIC.sub(r"\1* \2 = static_cast<\1*>(on_host::dynamic_memory());", called)


@functools.cache
def emulated(*operators: str) -> ctypes.CDLL:
    """The launchers of these operators' folders, with kernels that run on the host.

    The test is skipped where there is no compiler.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the kernels for the host")
    return ctypes.CDLL(
        str(made_once(f"{'-'.join(operators)}.cuda.so", functools.partial(_compile, compiler, operators)))
    )


def _compile(compiler: str, operators: tuple[str, ...], path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-std=c++17", "-O1", "-w", "-fPIC", "-shared", "-o", str(path)]
        command += ["-include", str(HERE / "cuda_on_host.h"), "-I", str(HERE), "-I", str(OPERATORS / "native")]
        command += [part for name in operators for part in ("-I", str(OPERATORS / name))]
        for name in operators:
            made = Path(folder) / f"{name}.cc"
            # Included by where they lie: files of the same name are in several folders.
            text = (OPERATORS / name / "cuda.cu").read_text()
            made.write_text(
                re.sub(r'#include "((?:\.\./)?[\w/]+\.\w+)"', functools.partial(_located, name), for_host(text))
            )
            command.append(str(made))
        subprocess.run(command, check=True)


def _located(name: str, include: re.Match[str]) -> str:
    path = OPERATORS / name / include[1]
    return f'#include "{path}"' if path.is_file() else include[0]


def pointer(array: np.ndarray | None) -> ctypes.c_void_p | None:
    """An array as a launcher takes it; nothing for None and for an empty one."""
    return None if array is None or array.size == 0 else ctypes.c_void_p(array.ctypes.data)


def size(value: Any) -> ctypes.c_int64:
    """A size as a launcher takes it."""
    return ctypes.c_int64(int(value))
