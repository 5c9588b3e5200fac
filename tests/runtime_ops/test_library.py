"""Where the library is, which nodes it runs, and what it is made of."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import onnx_ir as ir
import pytest

from graphopt.runtime_ops import library_path, operators
from graphopt.runtime_ops.library import described, kernels, mentioned, offered, without_kernel
from graphopt.runtime_ops.operator import DOMAIN, add_body, folder_of, uses

FOLDER = Path(__file__).parents[2] / "graphopt" / "runtime_ops"
CPU = "CPUExecutionProvider"


def library() -> Path:
    path = library_path()
    if path is None:
        pytest.skip("the library with the kernels isn't built")
    return path


def model_of(*types: ir.DataType | None, name: str = "HadamardTransform", domain: str = DOMAIN) -> ir.Model:
    inputs = [ir.Value(name=f"i{n}", type=ir.TensorType(t) if t is not None else None) for n, t in enumerate(types)]
    node = ir.Node(domain, name, inputs, name="here")
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports={"": 21, domain: 1}, name="g")
    return ir.Model(graph, ir_version=10)


def test_the_library_is_there_where_it_can_be_built() -> None:
    """An installation without it works, so nothing else would tell."""
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("there is no C++ compiler")
    path = library_path()
    assert path is not None, "there is a C++ compiler, but no library: see `pip install -v .`, or run `make library`"
    found = {(name, provider) for name, provider, _ in kernels(path)}
    folders = {name: FOLDER / folder_of(name) for name in operators()}
    for provider, source in ((CPU, "cpu.cc"), ("CUDAExecutionProvider", "cuda.cc")):
        if source == "cpu.cc" or shutil.which("nvcc") is not None:
            wanted = {name for name, folder in folders.items() if (folder / source).is_file()}
            assert {name for name, p in found if p == provider} == wanted, f"{path} was built without some {source}"


def test_a_kernel_takes_every_type_that_the_body_takes() -> None:
    """A letter stands for one of the operator's types, the same one wherever it stands; "float or float16" says both."""
    known = kernels(library())
    for name, operator in operators().items():
        kinds = dict.fromkeys(p.type for p in operator.inputs)
        choices = [operator.types if len(kind) == 1 else tuple(kind.split(" or ")) for kind in kinds]
        for provider in {p for n, p, _ in known if n == name}:
            for chosen in itertools.product(*choices):
                types = dict(zip(kinds, chosen, strict=True))
                wanted = tuple(int(ir.DataType[types[p.type].upper()]) for p in operator.inputs)
                assert (name, provider, wanted) in known, f"{name} on {provider} lacks {types}"


def test_the_environment_names_another_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GRAPHOPT_LIBRARY", str(tmp_path / "mine.so"))
    assert library_path() == tmp_path / "mine.so"
    monkeypatch.setenv("GRAPHOPT_LIBRARY", "")
    assert library_path() is None
    monkeypatch.delenv("GRAPHOPT_LIBRARY")
    import graphopt.runtime_ops as package

    monkeypatch.setattr(package, "__path__", [str(tmp_path / "old"), str(tmp_path / "new")])
    assert library_path() is None


def test_of_two_builds_the_last_one_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    import graphopt.runtime_ops as package

    name = library().name
    monkeypatch.delenv("GRAPHOPT_LIBRARY", raising=False)
    monkeypatch.setattr(package, "__path__", [str(tmp_path / "one"), str(tmp_path / "other")])
    for folder, age in (("one", 100), ("other", 200)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).touch()
        os.utime(tmp_path / folder / name, (age, age))
    assert library_path() == tmp_path / "other" / name


def test_a_user_is_told_what_there_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = library()
    assert set(offered()[CPU]) <= set(operators())
    assert described().startswith(f"own operators: kernels for {len(offered()[CPU])} on CPU")
    assert str(path) in described()
    monkeypatch.setenv("GRAPHOPT_LIBRARY", str(tmp_path / "none.so"))
    assert "can't be loaded" in described()
    monkeypatch.setenv("GRAPHOPT_LIBRARY", "")
    assert offered() == {}
    assert "needs a C++ compiler" in described()


def test_which_nodes_it_runs() -> None:
    path, F = library(), ir.DataType
    assert without_kernel(model_of(F.FLOAT, F.FLOAT), path, [CPU]) is None
    assert without_kernel(model_of(F.FLOAT16, F.FLOAT), path, ["CUDAExecutionProvider"]) is None
    assert without_kernel(model_of(None, F.FLOAT), path, [CPU]) is None
    odd = without_kernel(model_of(F.DOUBLE, F.FLOAT), path, [CPU])
    assert odd is not None
    assert odd.name == "here"
    # What the library doesn't know keeps its body, beside what it knows.
    assert without_kernel(model_of(F.DOUBLE, name="Unheard"), path, [CPU]) is None


def test_nodes_are_found_wherever_they_are() -> None:
    inner = model_of(ir.DataType.FLOAT, ir.DataType.FLOAT)
    add_body(inner, "HadamardTransform")
    assert [n.name for n in uses(inner)] == ["here"]  # not what is in the bodies
    function = ir.Function("mine", "Block", graph=inner.graph.clone(), attributes=[])
    outer = model_of(ir.DataType.FLOAT, ir.DataType.FLOAT, name="Block", domain="mine")
    outer.functions[function.identifier()] = function
    assert [n.op_type for n in uses(outer)] == ["HadamardTransform"]


def test_a_file_tells_without_being_loaded(tmp_path: Path) -> None:
    ir.save(model_of(ir.DataType.FLOAT, ir.DataType.FLOAT), tmp_path / "a.onnx")
    ir.save(model_of(ir.DataType.FLOAT, name="Neg", domain=""), tmp_path / "b.onnx")
    (tmp_path / "c.onnx").touch()
    assert [mentioned(tmp_path / f"{name}.onnx") for name in "abc"] == [True, False, False]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf")
def test_nothing_but_the_system_is_needed() -> None:
    """No ONNX Runtime, no CUDA: the library loads where neither is."""
    listed = subprocess.run(["readelf", "-d", library()], capture_output=True, text=True, check=True).stdout
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", listed))
    system = ("libstdc++.so", "libm.so", "libgcc_s.so", "libc.so", "ld-linux", "libpthread.so", "librt.so", "libdl.so")
    assert [name for name in needed if not name.startswith(system)] == []


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
def test_inner_loops_share_no_function() -> None:
    """Of an inline function that several object files hold the linker keeps one, whichever instructions it has.

    Were one in the inner loops, those for AVX-512 could end up in code that older machines run. Names that have the set
    of instructions in them are no danger.
    """
    objects = [
        file
        for file in sorted(Path(__file__).parents[2].glob("build/**/simd_*.dir/**/simd.cc.o"))
        if (source := FOLDER / file.parent.name / "simd.cc").is_file()
        and source.stat().st_mtime <= file.stat().st_mtime
        and "sanitize" not in file.parts
    ]
    if not objects:
        pytest.skip("the object files of the library aren't kept here")
    for file in objects:
        symbols = subprocess.run(["nm", "-C", file], capture_output=True, text=True, check=True).stdout.splitlines()
        isa = next(part for part in file.parts if part.startswith("simd_")).removeprefix("simd_").removesuffix(".dir")
        shared = [line for line in symbols if re.search(r" [WVu] ", line) and f"::{isa}::" not in line]
        assert not shared, f"{file}: {shared}"
