"""graphopt and its peers as commands, each run in a process of its own, with its time and its peak memory.

Each peer is called as its documentation shows, with its defaults. `onnxscript` and `onnxruntime` come with graphopt's
own dependencies, the others with its extra `zoo`.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

INLINE_BYTES = 1_000_000_000
"""Models of more bytes than this are written with external data."""

BUILDER = "genai graph"
"""The file of onnxruntime-genai's model builder, run by a plain session as all others are."""
GENAI = "genai"
"""The same file run by onnxruntime-genai."""

_SPAWN = """
import json, os, sys, time
log, limit, command = sys.argv[1], float(sys.argv[2]), sys.argv[3:]
out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
begin = time.perf_counter()
pid = os.posix_spawn(command[0], command, os.environ, file_actions=[
    (os.POSIX_SPAWN_DUP2, out, 1), (os.POSIX_SPAWN_DUP2, out, 2)])
while True:
    done, status, usage = os.wait4(pid, os.WNOHANG)
    wall = time.perf_counter() - begin
    if done:
        break
    if wall > limit:
        os.kill(pid, 9)
        status, usage = os.wait4(pid, 0)[1:]
        break
    time.sleep(0.01)
print(json.dumps([wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000, os.waitstatus_to_exitcode(status)]))
"""
"""A process that has imported nothing starts the tool: the peak that the system keeps for a child begins with its
parent's."""

_PEERS = {
    "onnxslim": (
        "onnxslim",
        "import sys, onnxslim; onnxslim.slim(sys.argv[1], sys.argv[2], save_as_external_data=bool(sys.argv[3]))",
    ),
    "onnxsim": (
        "onnxsim",
        "import sys, onnx, onnxsim; m, ok = onnxsim.simplify(sys.argv[1]);"
        "onnx.save(m, sys.argv[2], save_as_external_data=bool(sys.argv[3]))",
    ),
    "onnxscript": (
        "onnxscript",
        "import sys, onnx_ir as ir, onnxscript.optimizer as o;"
        "m = ir.load(sys.argv[1]); o.optimize_ir(m);"
        "ir.save(m, sys.argv[2], external_data='peer.data' if sys.argv[3] else None)",
    ),
    "onnxscript for ORT": (
        "onnxscript",
        "import sys, onnx_ir as ir; from onnxscript.rewriter.ort_fusions import optimize_for_ort as o;"
        "m, _ = o(ir.load(sys.argv[1]));"
        "ir.save(m, sys.argv[2], external_data='peer.data' if sys.argv[3] else None)",
    ),
    "ORT transformers": (
        "onnxruntime",
        "import sys; from onnxruntime.transformers import optimizer as o;"
        "o.optimize_model(sys.argv[1]).save_model_to_file(sys.argv[2], use_external_data_format=bool(sys.argv[3]))",
    ),
    "ORT offline": (
        "onnxruntime",
        "import sys, onnxruntime as ort; o = ort.SessionOptions(); o.optimized_model_filepath = sys.argv[2];"
        "_ = sys.argv[3] and (o.add_session_config_entry("
        "'session.optimized_model_external_initializers_file_name', 'peer.data'),"
        "o.add_session_config_entry('session.optimized_model_external_initializers_min_size_in_bytes', '1024'));"
        "ort.InferenceSession(sys.argv[1], o, providers=['CPUExecutionProvider'])",
    ),
}


@dataclasses.dataclass(frozen=True)
class Tool:
    """A program that writes an optimized model.

    Attributes:
        name: As in tables.
        package: The distribution that must be installed.
        arguments: What follows the Python interpreter; the model, the target and a flag (non-empty: external data)
            are appended where `code` is set.
        code: Whether `arguments` is code that reads these three from `sys.argv`.
    """

    name: str
    package: str
    arguments: tuple[str, ...]
    code: bool = True

    def command(self, model: Path, target: Path) -> list[str]:
        """The command that reads `model` and writes `target`."""
        if not self.code:
            split = self.arguments.index("optimize") + 1
            places = (str(model), "-o", str(target), "--force")
            return [sys.executable, *self.arguments[:split], *places, *self.arguments[split:]]
        files = model_files(model)
        # A peer that writes inline may leave references to the original's data file, which isn't beside the result.
        external = len(files) > 1 or sum(f.stat().st_size for f in files) > INLINE_BYTES
        return [sys.executable, *self.arguments, str(model), str(target), "1" if external else ""]

    @property
    def version(self) -> str | None:
        """The installed version, None where the package isn't installed."""
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None


def graphopt_tool(verify: str = "auto", recipe: str | None = None, assume: Sequence[str] = ()) -> Tool:
    """`graphopt optimize`, by default with its default recipe and without assumptions on the inputs."""
    options = ["--verify", verify, *(("--recipe", recipe) if recipe else ())]
    for assumption in assume:
        options += ["--assume", assumption]
    name = "graphopt assuming" if assume else "graphopt"
    return Tool(name, "graphopt", ("-m", "graphopt", "optimize", *options), code=False)


PEERS = tuple(Tool(name, package, ("-c", code)) for name, (package, code) in _PEERS.items())


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one process took, start-up and imports included.

    Attributes:
        wall_s: Seconds of wall-clock time.
        cpu_s: Seconds of CPU time.
        peak_mb: The largest resident set in MB (memory-mapped pages that were touched count).
        status: Exit status; negative: the signal that ended it.
        error: The last line that it wrote, where it failed.
    """

    wall_s: float
    cpu_s: float
    peak_mb: float
    status: int
    error: str = ""


def measure(command: Sequence[str], log: Path, timeout_s: float = 600.0) -> Cost:
    """Run `command`, its output going to `log`, for at most `timeout_s` seconds."""
    spawn = [sys.executable, "-I", "-S", "-c", _SPAWN, str(log), str(timeout_s), *command]
    wall, cpu, peak, status = json.loads(subprocess.run(spawn, check=True, stdout=subprocess.PIPE).stdout)
    error = ""
    if status:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        error = f"stopped after {timeout_s:.0f} s" if wall > timeout_s else (lines or [f"exit status {status}"])[-1]
    return Cost(wall, cpu, peak, status, error)


def model_files(path: Path) -> list[Path]:
    """The files of a model that stands in a folder of its own: itself, and its external data."""
    import onnx_ir as ir

    model = ir.load(path)
    graphs = [model.graph, *model.graph.subgraphs()]
    tensors = [v.const_value for graph in graphs for v in graph.initializers.values()]
    return [path, *sorted({Path(t.path) for t in tensors if isinstance(t, ir.ExternalTensor)})]
