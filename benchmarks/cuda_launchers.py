"""The launchers of the library's CUDA kernels, called from Python with the arguments that their headers declare."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OPERATORS = ROOT / "graphopt" / "runtime_ops"
_DECLARATION = re.compile(r"GRAPHOPT_LAUNCHER\s+([\w\s]+?\*?)\s*(graphopt_cuda_\w+)\s*\(([^)]*)\)\s*;")
_STRUCTURE = re.compile(r"\bstruct\s+(\w+)\s*\{([^{}]*)\}\s*;")
Arguments = Mapping[str, Any] | Sequence[Any]
Fields = tuple[tuple[str, str], ...]
_TYPES: Mapping[str, Any] = {
    "int": ctypes.c_int, "int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "size_t": ctypes.c_size_t,
    "float": ctypes.c_float, "const char*": ctypes.c_char_p,
}  # fmt: skip


class Unavailable(Exception):
    """CUDA kernels can't be run here, for a reason that the message says in one sentence."""


@dataclasses.dataclass(frozen=True)
class Launcher:
    """A launcher as a header declares it.

    Attributes:
        name: Its symbol.
        folder: The operator's folder that declares it.
        result: What it returns, a C type.
        parameters: Types and names, as in C; a stream comes last where it launches something.
        structs: The structures that its header declares: types and names of their fields.
    """

    name: str
    folder: str
    result: str
    parameters: tuple[tuple[str, str], ...]
    structs: Mapping[str, Fields] = dataclasses.field(default_factory=dict)

    @property
    def launches(self) -> bool:
        return bool(self.parameters) and self.parameters[-1] == ("void*", "stream")

    def converted(self, arguments: Arguments) -> list[Any]:
        """The arguments, by name or in the order of the header, as ctypes wants them in that order, without the stream.

        Tensors become pointers to what they hold. A structure is filled from the arguments of its fields' names.

        Raises:
            TypeError: One is missing, unknown, or of another kind than is declared.
        """
        wanted = self.parameters[:-1] if self.launches else self.parameters
        if not isinstance(arguments, Mapping):
            if len(arguments) != len(wanted):
                raise TypeError(f"{self.name} takes {len(wanted)} arguments, and is given {len(arguments)}")
            arguments = {name: argument for (_, name), argument in zip(wanted, arguments, strict=True)}
        unused = set(arguments)
        made = [self._converted(arguments, unused, *parameter) for parameter in wanted]
        if unused:
            raise TypeError(f"{self.name} takes no argument {min(unused)}")
        return made

    def _converted(self, arguments: Mapping[str, Any], unused: set[str], kind: str, name: str) -> Any:
        fields = self.structs.get(kind.removeprefix("const ").removesuffix("*"))
        if fields is not None:
            made = _structure(fields)()
            for field_kind, field in fields:
                setattr(made, field, self._converted(arguments, unused, field_kind, field))
            return ctypes.byref(made)
        if name not in arguments:
            raise TypeError(f"{self.name} needs its argument {name}")
        unused.discard(name)
        argument = arguments[name]
        if kind.endswith("*"):
            if argument is None:
                return None
            if not hasattr(argument, "data_ptr") or not argument.is_contiguous():
                raise TypeError(f"{name} must be a contiguous tensor, not {argument!r}")
            return ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, bool) or not isinstance(argument, float if kind == "float" else int):
            raise TypeError(f"{name} must be of the type {kind}, not {argument!r}")
        return _TYPES[kind](argument)


def _structure(fields: Fields) -> type[ctypes.Structure]:
    listed = [(name, ctypes.c_void_p if kind.endswith("*") else _TYPES[kind]) for kind, name in fields]
    return type("Fields", (ctypes.Structure,), {"_fields_": listed})


def declared() -> dict[str, Launcher]:
    """The launchers that the operators' headers declare, by name."""
    found = {}
    for path in sorted(OPERATORS.glob("*/*.h")):
        text = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
        if "GRAPHOPT_LAUNCHER" not in text:
            continue
        structs = {name: _fields(body) for name, body in _STRUCTURE.findall(text)}
        for result, name, parameters in _DECLARATION.findall(text):
            listed = tuple(_parameter(part) for part in parameters.split(",") if part.strip())
            found[name] = Launcher(name, path.parent.name, " ".join(result.split()), listed, structs)
    return found


def _fields(body: str) -> Fields:
    """The fields of a structure; several names may stand behind one type."""
    found: list[tuple[str, str]] = []
    for declaration in body.split(";"):
        if declaration.strip():
            first, *more = declaration.split(",")
            kind, name = _parameter(first)
            found += [(kind, name), *((kind, other.strip()) for other in more)]
    return tuple(found)


def _parameter(text: str) -> tuple[str, str]:
    words, name = re.fullmatch(r"\s*(.*?[\s*])(\w+)\s*", text, re.DOTALL).groups()  # type: ignore[union-attr]
    kind = " ".join(words.split()).replace(" *", "*")
    if not kind.endswith("*") and kind not in _TYPES:
        raise ValueError(f"launchers don't take {kind}")
    return kind, name


class Launchers:
    """The launchers of a library.

    Args:
        library: The loaded library.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.declared = declared()

    def call(self, name: str, arguments: Arguments, stream: int = 0) -> int:
        """What a launcher returns.

        Raises:
            KeyError: No header declares it.
            TypeError: The arguments aren't those that it takes.
        """
        launcher = self.declared[name]
        function = getattr(self.library, name)
        function.restype = _TYPES[launcher.result]
        given = launcher.converted(arguments)
        return int(function(*given, ctypes.c_void_p(stream)) if launcher.launches else function(*given))

    def launch(self, name: str, arguments: Arguments, stream: int = 0) -> None:
        """Launch, and see that CUDA takes it.

        Raises:
            RuntimeError: CUDA says no.
        """
        if code := self.call(name, arguments, stream):
            function = self.library.graphopt_cuda_error
            function.restype = ctypes.c_char_p
            raise RuntimeError(f"{name} gives CUDA error {code}, {function(code).decode()}")


def built(path: Path | None = None) -> Path:
    """The library with CUDA kernels: the one at `path`, or one built from the sources.

    Raises:
        Unavailable: It holds none, or there is nothing to build it with.
    """
    if path is None:
        if shutil.which("nvcc") is None or shutil.which("cmake") is None:
            raise Unavailable("The library can't be built: nvcc or cmake is missing; name a built one with --library.")
        folder = ROOT / "build" / "cuda"
        for command in (
            ["cmake", "-S", str(OPERATORS / "native"), "-B", str(folder), "-DGRAPHOPT_WERROR=ON"],
            ["cmake", "--build", str(folder), "--parallel"],
        ):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise Unavailable(f"The library can't be built: {' '.join(command)} says\n{done.stdout}{done.stderr}")
        path = next(folder.glob("*graphopt_ops.*"))
    if not hasattr(ctypes.CDLL(str(path)), "graphopt_cuda_error"):
        raise Unavailable(f"{path} was built without CUDA kernels.")
    return path


@functools.cache
def gpu() -> Any:
    """PyTorch, with a GPU at hand.

    Raises:
        Unavailable: One of them is missing.
    """
    try:
        import torch
    except ImportError as error:
        raise Unavailable("PyTorch, the reference of the CUDA kernels, isn't installed.") from error
    if not torch.cuda.is_available():
        raise Unavailable("There is no GPU: PyTorch sees no CUDA device, and CUDA kernels run on nothing else.")
    return torch
