"""The command line as a user meets it: results, exit codes, one clear sentence for each mistake, no tracebacks."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import onnx
import pytest
from test_pass_manager import Replace

import graphopt.cli
from graphopt.passes import registry
from tests.cli.conftest import Run

TEXT = """<ir_version: 8, opset_import: ["": 17]>
g (float[n, 4] x) => (float[n, 4] y) <float[4] w = {1, 2, 3, 4}> {
  i = Identity(x)  a = Mul(i, w)  b = Mul(i, w)  c = Add(a, b)  y = Tanh(c)
}"""


class TanhToSin(Replace):
    """A wrong pass."""

    name = "tanh-to-sin"
    anchors = ("Tanh",)

    def __init__(self) -> None:
        super().__init__("Tanh", "Sin")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    return path


def test_what_lies_beside_a_model_comes_along(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert run("optimize", model, "-o", tmp_path / "new" / "model.onnx")[0] == 0
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == {"model_type": "llama"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    code, out, _ = run("optimize", model, "-o", tmp_path / "other" / "model.onnx")
    assert code == 0
    assert (tmp_path / "other" / "config.json").read_text() == "{}"
    assert "config.json was there and is left as it is" in " ".join(out.split())


def test_the_version_tells_of_kernels(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--version")[1].startswith(f"graphopt, version {graphopt.__version__}\nown operators: ")
    monkeypatch.setenv("GRAPHOPT_LIBRARY", "")
    assert "portable bodies" in run("--version")[1]


def test_package(run: Run, model: Path, tmp_path: Path) -> None:
    code, out, _ = run("package", model, "-o", tmp_path / "served")
    assert code == 0
    assert f"{tmp_path / 'served' / 'README.md'} says how to run it" in out
    assert "the model has no operators of graphopt's" in out
    assert run("package", model, "-o", tmp_path / "served")[0] == 2
    code, out, _ = run("package", model, "-o", tmp_path / "served", "--force", "--json")
    assert (code, json.loads(out)["files"]) == (0, ["README.md", "graphopt.json", "model.onnx"])
    assert "--force" in run("package", "--help")[1]
    code, _, err = run("package", tmp_path / "none.onnx", "-o", tmp_path / "other")
    assert (code, err.count("\n")) == (3, 1)


def test_optimize(run: Run, model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    report = tmp_path / "out" / "report.html"
    code, out, _ = run("optimize", model, "--report", report)
    assert code == 0
    assert "3 probes" in out
    assert "eliminate-identities" in out
    assert model.read_bytes() == before
    assert [n.op_type for n in onnx.load(tmp_path / "model.opt.onnx").graph.node] == ["Mul", "Add", "Tanh"]
    page = report.read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert "http" not in page.replace("http://www.w3.org", "")  # nothing is loaded from a network
    code, _, err = run("optimize", model)
    assert code == 2
    assert "--force" in err
    assert run("optimize", model, "--force")[0] == 0


def test_optimize_json_bench_and_in_place(run: Run, model: Path, tmp_path: Path) -> None:
    code, out, _ = run("optimize", model, "-o", tmp_path / "o.onnx", "--json", "--bench")
    data = json.loads(out)
    assert code == 0
    assert data["ok"]
    assert data["before"]["nodes"] == 5
    assert data["after"]["nodes"] == 3
    assert data["output"]["bytes"] == (tmp_path / "o.onnx").stat().st_size
    assert data["timing"]
    assert data["verification"]["ok"]
    assert {"name", "status", "sites", "seconds", "before", "after"} <= set(data["passes"][0])
    assert run("optimize", model, "--in-place")[0] == 0
    assert len(onnx.load(model).graph.node) == 3


def test_same_input_same_bytes(run: Run, model: Path, tmp_path: Path) -> None:
    for name in ("1.onnx", "2.onnx"):
        assert run("optimize", model, "-o", tmp_path / name, "--json")[0] == 0
    assert (tmp_path / "1.onnx").read_bytes() == (tmp_path / "2.onnx").read_bytes()


def test_recipes(run: Run, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("passes:\n  - eliminate-identities\n")
    code, out, _ = run("optimize", model, "-o", tmp_path / "o.onnx", "--recipe", recipe, "--json")
    assert code == 0
    assert {p["name"] for p in json.loads(out)["passes"]} == {"eliminate-identities"}
    assert run("optimize", model, "-o", tmp_path / "p.onnx", "--recipe", "clean")[0] == 0


def test_a_pass_taken_back_gives_its_own_exit_code(run: Run, model: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("passes:\n  - eliminate-identities\n  - test_pass_manager:NegToAbs\n  - cli.test_cli:TanhToSin\n")
    code, out, _ = run("optimize", model, "-o", tmp_path / "o.onnx", "--recipe", recipe)
    assert code == 6
    assert "tanh-to-sin" in out
    assert "Tanh" in [n.op_type for n in onnx.load(tmp_path / "o.onnx").graph.node]


def test_verify(run: Run, model: Path, tmp_path: Path) -> None:
    run("optimize", model)
    assert run("verify", model, tmp_path / "model.opt.onnx")[0] == 0
    proto = onnx.parser.parse_model(TEXT.replace("{1, 2, 3, 4}", "{1.01, 2, 3, 4}"))
    onnx.save(proto, tmp_path / "other.onnx")
    code, out, _ = run("verify", model, tmp_path / "other.onnx")
    assert code == 5
    assert "y" in out
    code, out, _ = run("verify", model, tmp_path / "other.onnx", "--json")
    assert code == 5
    assert not json.loads(out)["ok"]
    onnx.save(onnx.parser.parse_model(TEXT.replace(" y)", " z)").replace("y = Tanh", "z = Tanh")), tmp_path / "z.onnx")
    code, _, err = run("verify", model, tmp_path / "z.onnx")
    assert code == 5
    assert "output 'y'" in err


def test_inspect(run: Run, model: Path) -> None:
    code, out, _ = run("inspect", model, "--why")
    assert code == 0
    assert "Tanh" in out
    data = json.loads(run("inspect", model, "--json", "--dim", "n=7")[1])
    assert data["nodes"] == 5
    assert data["inputs"] == [{"name": "x", "dtype": "FLOAT", "shape": ["n", 4]}]
    assert data["operators"]["Mul"] == 2
    assert data["flops"] > 0
    assert run("inspect", model, "--dim", "n")[0] == 2
    assert "no dynamic dimension 'm'; they have n" in run("inspect", model, "--dim", "m=7")[2]


def test_bench(run: Run, model: Path) -> None:
    code, out, _ = run("bench", model, model, "--runs", 3, "--json")
    assert code == 0
    assert len(json.loads(out)["models"]) == 2
    code, out, _ = run("bench", model, "--runs", 3, "--dim", "n=2")
    assert code == 0
    assert "control" in out
    code, _, err = run("bench", model, "--dim", "m=2")
    assert code == 2
    assert "no dynamic dimension 'm'" in err


def test_passes(run: Run) -> None:
    code, out, _ = run("passes")
    assert code == 0
    assert "raise-layer-norm" in out
    assert "fold-constants" in {row["name"] for row in json.loads(run("passes", "list", "--json")[1])}
    code, out, _ = run("passes", "show", "fold-constants")
    assert code == 0
    assert "max_bytes" in out
    assert "max_bytes" in json.loads(run("passes", "show", "fold-constants", "--json")[1])["page"]
    code, _, err = run("passes", "show", "fold-constant")
    assert code == 2
    assert "fold-constants" in err


def test_target_models_and_help(run: Run) -> None:
    assert "LayerNormalization" in run("target")[1]
    assert json.loads(run("target", "--json")[1])["highest_opset"] >= 21
    assert "minilm" in run("models")[1]
    assert "Did you mean 'optimize'" in run("optimise")[2]
    for command in graphopt.cli.COMMANDS:
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "Examples:" in out


def nan_weights(path: Path) -> None:
    proto = onnx.parser.parse_model(TEXT)
    array = np.array([1, np.nan, 3, 4], np.float32)
    proto.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(array, "w"))
    onnx.save(proto, path)


def written(text: str) -> Callable[[Path], None]:
    return lambda path: onnx.save(onnx.parser.parse_model(text), path)


def undefined(path: Path) -> None:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.node[1].input[1] = "nowhere"
    onnx.save(proto, path)


def duplicate(path: Path) -> None:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.node[1].output[0] = "i"
    onnx.save(proto, path)


def cyclic(path: Path) -> None:
    proto = onnx.parser.parse_model(TEXT)
    proto.graph.node[0].input[0] = "c"
    onnx.save(proto, path)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "html": (lambda path: path.write_text("<html><body>Not found</body></html>"), "web page"),
    "truncated": (lambda path: path.write_bytes(onnx.parser.parse_model(TEXT).SerializeToString()[:-20]), "model.onnx"),
    "undefined": (undefined, "nowhere"),
    "duplicate": (duplicate, "'i'"),
    "cyclic": (cyclic, "cycle"),
    "shapes": (written('<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (float[2, 4] y) { y = Relu(x) }'), ""),
    "operator": (written('<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Foo(x) }'), "Foo"),
    "arity": (written('<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu(x, x) }'), "Relu"),
    "attribute": (
        written('<ir_version: 8, opset_import: ["": 17]> g (float[2] x) => (float[2] y) { y = Relu<a = 1>(x) }'), "Relu"),
    "opset": (written('<ir_version: 8, opset_import: ["": 999]> g (float[2] x) => (float[2] y) { y = Relu(x) }'), "opset"),
}  # fmt: skip


@pytest.mark.parametrize("command", ["optimize", "inspect", "verify", "bench"])
@pytest.mark.parametrize("kind", [k for k in BROKEN if k != "shapes"])
def test_broken_models(run: Run, tmp_path: Path, kind: str, command: str) -> None:
    path = tmp_path / "model.onnx"
    make, says = BROKEN[kind]
    make(path)
    content = path.read_bytes() if path.exists() else None
    files = sorted(tmp_path.iterdir())
    code, out, err = run(command, path, *([path] if command == "verify" else []))
    if kind == "opset" and command == "inspect":
        assert code == 0  # what a newer opset holds can be looked at
    else:
        assert code in (3, 5), (code, err)
    assert says in out + err
    assert len(err.strip().splitlines()) <= 1, err
    assert sorted(tmp_path.iterdir()) == files, "something was left behind"
    if content is not None:
        assert path.read_bytes() == content


def test_declared_output_shape_that_lies_is_no_reason_to_fail(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    BROKEN["shapes"][0](path)
    code, _, err = run("optimize", path)
    assert code in (0, 3), err
    if code == 3:
        assert "y" in err


def test_nan_weights(run: Run, tmp_path: Path) -> None:
    nan_weights(tmp_path / "model.onnx")
    code, _, err = run("optimize", tmp_path / "model.onnx")
    assert code == 3
    assert "'w' holds NaN" in err
    assert not (tmp_path / "model.opt.onnx").exists()
    assert run("optimize", tmp_path / "model.onnx", "--verify", "none")[0] == 0


def test_inputs_on_which_the_original_fails(run: Run, model: Path, tmp_path: Path) -> None:
    text = TEXT.replace("i = Identity(x)", "s = Reshape(x, t) i = Reshape(s, u)").replace(
        "<float[4] w", "<int64[2] t = {2, 4}, int64[2] u = {-1, 4}, float[4] w"
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "two.onnx")
    np.savez(tmp_path / "in.npz", x=np.zeros((3, 4), np.float32))
    code, _, err = run("optimize", tmp_path / "two.onnx", "--inputs", tmp_path / "in.npz")
    assert code == 4
    assert "doesn't run on in.npz" in err


def test_empty_outputs_prove_nothing(run: Run, model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "in.npz", x=np.zeros((0, 4), np.float32))
    code, out, _ = run("verify", model, model, "--inputs", tmp_path / "in.npz")
    assert code == 5
    assert "empty" in out


def test_calibration_that_nobody_needs(run: Run, model: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers isn't installed")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]")
    made = tokenizers.Tokenizer(words)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "t.txt").write_text("a " * 600)
    code, _, err = run("optimize", model, "--calibration", tmp_path / "t.txt", "--tokenizer", tmp_path)
    assert code == 2
    assert "needs calibration data" in err


def test_unknown_custom_operator(run: Run, tmp_path: Path) -> None:
    written(
        '<ir_version: 8, opset_import: ["": 17, "acme": 1]> g (float[2] x) => (float[2] y) { i = Identity(x) y = acme.Foo(i) }'
    )(tmp_path / "model.onnx")
    code, _, err = run("optimize", tmp_path / "model.onnx")
    assert code == 5
    assert "Foo" in err
    assert "--verify none" in err
    assert run("optimize", tmp_path / "model.onnx", "--verify", "none")[0] == 0
    assert [n.op_type for n in onnx.load(tmp_path / "model.opt.onnx").graph.node] == ["Foo"]


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"z": np.zeros((2, 4), np.float32)}, "x"),
        ({"x": np.zeros((2, 5), np.float32)}, "x"),
        ({"x": np.zeros((2, 4), np.float64)}, "float64"),
        ({"x": np.zeros(4, np.float32)}, "x"),
    ],
)
def test_inputs_that_do_not_fit(
    run: Run, model: Path, tmp_path: Path, arrays: dict[str, np.ndarray], says: str
) -> None:
    np.savez(tmp_path / "in.npz", **arrays)
    code, _, err = run("optimize", model, "--inputs", tmp_path / "in.npz")
    assert code == 4
    assert says in err
    assert not (tmp_path / "model.opt.onnx").exists()


def test_other_mistakes(run: Run, model: Path, tmp_path: Path) -> None:
    assert run("optimize", model, "-o", model)[0] == 2
    assert run("optimize", model, "-o", tmp_path / "o.onnx", "--in-place")[0] == 2
    assert run("optimize", model, "--recipe", "exat")[0] == 2
    assert "did you mean exact" in run("optimize", model, "--recipe", "exat")[2]
    assert run("optimize", model, "--target", "tpu")[0] == 2
    assert run("optimize", model, "--shard-size", "big")[0] == 2
    assert run("optimize", model, "--tokenizer", tmp_path)[0] == 2
    (tmp_path / "not.npz").write_text("no")
    assert run("optimize", model, "--inputs", tmp_path / "not.npz")[0] == 4
    assert run("optimize")[0] == 2
    assert not (tmp_path / "model.opt.onnx").exists()


def test_places_where_nothing_can_be_written_are_refused_before_the_work(run: Run, model: Path, tmp_path: Path) -> None:
    before = model.read_bytes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("no folder")
    for output, says in (
        (tmp_path / "folder", "is a folder"),
        (f"{tmp_path}/new/", "is a folder"),
        (tmp_path / "file" / "o.onnx", "is not a folder"),
        (tmp_path / "missing" / ".." / "model.onnx", "is the input"),  # no such folder yet: the input all the same
    ):
        for arguments in (("-o", output, "--force"), ("-o", tmp_path / "o.onnx", "--report", output)):
            code, _, err = run("optimize", model, *arguments)
            assert code == 2
            assert says in err or "which is a model" in err
    assert run("optimize", model, "-o", tmp_path / "o.onnx", "--shard-size", "0")[0] == 2
    assert run("optimize", model, "-o", tmp_path / "o.onnx", "--shard-size", "1MB", "--inline")[0] == 2
    assert run("optimize", model, "--in-place", "--bench")[0] == 2
    assert model.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder", "model.onnx"]


@pytest.mark.parametrize("arguments", [("optimize", "."), ("optimize", ".."), ("inspect", "."), ("optimize", "")])
def test_a_folder_is_no_model(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run(*arguments)
    assert code == 3
    assert "is a folder" in err


def test_in_place_through_a_link_replaces_the_file_and_keeps_its_mode(run: Run, model: Path, tmp_path: Path) -> None:
    link = tmp_path / "elsewhere" / "link.onnx"
    link.parent.mkdir()
    link.symlink_to(model)
    model.chmod(0o640)
    assert run("optimize", link, "--in-place")[0] == 0
    assert link.is_symlink()
    assert len(onnx.load(model).graph.node) == 3
    assert model.stat().st_mode & 0o777 == 0o640


def test_names_are_printed_as_they_are(run: Run, model: Path, tmp_path: Path) -> None:
    code, out, _ = run("optimize", model, "--report", tmp_path / "[b]é 模.html")
    assert code == 0
    assert "[b]é 模.html" in out


def test_an_encoding_that_lacks_characters(model: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    command = [sys.executable, "-m", "graphopt", "optimize", model, "--report", tmp_path / "r.html"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "→" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_passes_of_other_packages_are_listed_with_what_they_say(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    group = registry.ENTRY_POINTS
    offered = {
        "tanh-to-sin": EntryPoint("tanh-to-sin", "cli.test_cli:TanhToSin", group),
        "lost": EntryPoint("lost", "nowhere:Lost", group),
    }
    monkeypatch.setattr(registry, "offered", lambda: offered)
    rows = {row["name"]: row for row in json.loads(run("passes", "--json")[1])}
    assert rows["tanh-to-sin"]["guarantee"] == "exact"
    assert "can't be loaded" in rows["lost"]["summary"]
    assert run("passes", "show", "tanh-to-sin")[1].startswith("# tanh-to-sin")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted(model: Path, number: signal.Signals) -> None:
    # A million rounds of timing don't end by themselves.
    process = subprocess.Popen(
        [sys.executable, "-m", "graphopt", "bench", model, model, "--runs", "1000000"],
        stderr=subprocess.PIPE,
        text=True,
        # Where the tests themselves run in the background of a shell, an interruption is ignored, by children too.
        preexec_fn=functools.partial(signal.signal, number, signal.SIG_DFL),
    )
    try:
        time.sleep(2.5)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    if process.returncode == 0:
        pytest.fail("it ended before it could be interrupted")
    assert "Traceback" not in err
    assert not list(model.parent.glob(".graphopt-*"))
