"""Saving: streamed, with external data, atomic under failure and kill, never over the input by accident."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir
import pytest

from graph.test_load import TEXT, big_model, write
from graphopt.errors import ModelError, UsageError
from graphopt.graph import load, save

SAVE = "import sys; from graphopt.graph import load, save; save(load(sys.argv[1]), sys.argv[2], external_data={})"


def same_model(a: Path, b: Path) -> None:
    first, second = onnx.load(a), onnx.load(b)
    onnx.checker.check_model(second)
    x = {"x": np.random.default_rng(1).normal(size=(3, 256)).astype(np.float32)}
    run = onnx.reference.ReferenceEvaluator
    np.testing.assert_array_equal(run(first).run(None, x)[0], run(second).run(None, x)[0])


@pytest.mark.parametrize("external", [False, True])
def test_round_trip(tmp_path: Path, external: bool) -> None:
    source = write(tmp_path / "m.onnx", big_model())
    files = save(load(source), tmp_path / "new" / "out.onnx", external_data=external)
    assert [f.name for f in files] == (["out.onnx", "out.onnx.data"] if external else ["out.onnx"])
    same_model(source, files[0])
    assert sorted(f.name for f in (tmp_path / "new").iterdir()) == sorted(f.name for f in files)


def test_data_moves_with_the_model(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    source = write(
        tmp_path / "a" / "m.onnx", big_model(), save_as_external_data=True, location="w.bin", size_threshold=0
    )
    target = tmp_path / "b" / "m.onnx"
    assert [f.name for f in save(load(source), target)] == ["m.onnx", "m.onnx.data"]  # external because it was
    same_model(source, target)


def test_shards(tmp_path: Path) -> None:
    proto = big_model()
    for i in range(4):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.full((128, 128), i, np.float32), f"extra{i}"))
    files = save(load(write(tmp_path / "m.onnx", proto)), tmp_path / "o.onnx", shard_bytes=150_000)
    assert len(files) > 3
    assert all(f.exists() for f in files)
    again = load(tmp_path / "o.onnx")
    assert again.graph.initializers["extra3"].const_value.numpy()[0, 0] == 3


def test_same_bytes_again(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", big_model())
    for external in (False, True):
        first = [f.read_bytes() for f in save(load(source), tmp_path / "1" / "o.onnx", external_data=external)]
        second = [f.read_bytes() for f in save(load(source), tmp_path / "2" / "o.onnx", external_data=external)]
        assert first == second


def test_never_over_the_input(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", big_model())
    before = source.read_bytes()
    (tmp_path / "link.onnx").symlink_to(source)
    for target in (source, tmp_path / "link.onnx"):
        with pytest.raises(UsageError, match="is the input"):
            save(load(source), target)
    assert source.read_bytes() == before


@pytest.mark.parametrize("external", [False, True])
def test_in_place(tmp_path: Path, external: bool) -> None:
    source = write(tmp_path / "m.onnx", big_model())
    copy = write(tmp_path / "copy" / "m.onnx" if (tmp_path / "copy").mkdir() is None else source, big_model())
    for _ in range(3):
        save(load(source), source, in_place=True, external_data=external)
        same_model(copy, source)
        data = [f for f in tmp_path.iterdir() if f.suffix == ".data"]
        assert len(data) == (1 if external else 0)


def test_replacing_keeps_data_that_another_model_uses(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", big_model())
    save(load(source), tmp_path / "o.onnx", external_data=True)
    (tmp_path / "twin.onnx").write_bytes((tmp_path / "o.onnx").read_bytes())
    save(load(source), tmp_path / "o.onnx", external_data=True)
    same_model(source, tmp_path / "o.onnx")
    same_model(source, tmp_path / "twin.onnx")


def test_lazy_weights_are_computed_when_saved(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", big_model())
    model = load(source)
    value = model.graph.initializers["w"]
    old = value.const_value
    value.const_value = ir.LazyTensor(
        lambda: ir.tensor(old.numpy() * 2), dtype=old.dtype, shape=ir.Shape(old.shape), name="w"
    )
    for external in (False, True):
        out = tmp_path / f"o{external}.onnx"
        save(model, out, external_data=external)
        np.testing.assert_array_equal(load(out).graph.initializers["w"].const_value.numpy(), old.numpy() * 2)


@pytest.mark.parametrize("shard_bytes", [None, 200_000])
def test_a_tensor_used_twice_is_written_once(tmp_path: Path, shard_bytes: int | None) -> None:
    computed: list[str] = []

    def compute() -> ir.TensorProtocol:
        computed.append("once")
        return ir.tensor(np.full((64, 64), 7, np.float32))

    (tmp_path / "a").mkdir()
    source = write(tmp_path / "a" / "m.onnx", big_model(), save_as_external_data=True, location="w.bin")
    model = load(source)
    old = model.graph.initializers["w"].const_value
    assert isinstance(old, ir.ExternalTensor)
    lazy = ir.LazyTensor(compute, dtype=ir.DataType.FLOAT, shape=ir.Shape([64, 64]), cache=False, name="lazy")
    tied = type(old)(
        old.location, old.offset, old.length, old.dtype, shape=ir.Shape([65536]), name="tied", base_dir=old.base_dir
    )
    for name, tensor in {"lazy": lazy, "tied": tied, "again": lazy}.items():
        model.graph.register_initializer(ir.Value(name=name, const_value=tensor))
    files = save(model, tmp_path / "b" / "o.onnx", external_data=True, shard_bytes=shard_bytes)
    assert computed == ["once"]
    assert sum(f.stat().st_size for f in files[1:]) == 256 * 256 * 4 + 64 * 64 * 4
    assert model.graph.initializers["again"].const_value is lazy
    initializers = load(files[0]).graph.initializers
    assert list(initializers) == ["w", "lazy", "tied", "again"]
    for name in ("lazy", "again"):
        np.testing.assert_array_equal(initializers[name].const_value.numpy(), 7)
    np.testing.assert_array_equal(initializers["tied"].const_value.numpy(), old.numpy().reshape(-1))


def test_external_data_of_a_model_without_large_weights(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", onnx.parser.parse_model(TEXT))
    assert save(load(source), tmp_path / "o.onnx", external_data=True) == [tmp_path / "o.onnx"]
    assert sorted(os.listdir(tmp_path)) == ["m.onnx", "o.onnx"]


def test_overridable_initializer_stays_one(tmp_path: Path) -> None:
    proto = big_model()
    proto.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [256, 256]))
    source = write(tmp_path / "m.onnx", proto)
    for external in (False, True):
        save(load(source), tmp_path / "o.onnx", external_data=external)
        again = onnx.load(tmp_path / "o.onnx", load_external_data=False)
        assert [v.name for v in again.graph.input] == ["x", "w"]
        assert [t.name for t in again.graph.initializer] == ["w"]


@pytest.mark.parametrize("external", [False, True])
def test_full_disk_leaves_nothing(tmp_path: Path, external: bool) -> None:
    source = write(tmp_path / "m.onnx", big_model(side=512))
    (tmp_path / "out").mkdir()
    script = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));" + SAVE.format(external)
    )
    target = tmp_path / "out" / "o.onnx"
    done = subprocess.run([sys.executable, "-c", script, source, target], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "couldn't be written" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "m.onnx", big_model())

    def refuse(*_: object, **__: object) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ModelError, match="couldn't be written: Permission denied"):
        save(load(source), tmp_path / "o.onnx")


@pytest.mark.parametrize("external", [False, True])
def test_killed_while_saving_in_place(tmp_path: Path, external: bool) -> None:
    """Killed at any moment, the input is the old model or the new one, whole."""
    proto = big_model(side=2048)
    source = write(tmp_path / "m.onnx", proto)
    save(load(source), source, in_place=True, external_data=external)
    script = SAVE.format(external).replace("external_data", "in_place=True, external_data")
    for delay in (0.0, 0.01, 0.02, 0.04, 0.08):
        process = subprocess.Popen([sys.executable, "-c", script, source, source])
        while process.poll() is None and not list(tmp_path.glob(".graphopt-*")):
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        np.testing.assert_array_equal(
            load(source).graph.initializers["w"].const_value.numpy(),
            onnx.numpy_helper.to_array(proto.graph.initializer[0]),
        )


def test_a_data_name_in_use_is_not_taken(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", big_model())
    (tmp_path / "o.onnx.data").write_bytes(b"")  # another run is about to write it
    assert [f.name for f in save(load(source), tmp_path / "o.onnx", external_data=True)] == ["o.onnx", "o.2.onnx.data"]
    same_model(source, tmp_path / "o.onnx")


def test_small_text_model(tmp_path: Path) -> None:
    source = write(tmp_path / "m.onnx", onnx.parser.parse_model(TEXT))
    files = save(load(source), tmp_path / "o.onnx")
    assert [n.op_type for n in onnx.load(files[0]).graph.node] == ["Add"]
    assert os.path.getsize(files[0]) < 1000


@pytest.mark.parametrize("external_data", [False, True])
def test_what_is_not_accepted_is_nowhere(tmp_path: Path, external_data: bool) -> None:
    """The file is whole when it is shown, and gone where it is refused; an older one stays."""
    weights = np.arange(4096, dtype=np.float32)
    text = """<ir_version: 8, opset_import: ["": 17]>
    g (float[4096] x) => (float[4096] y) <float[1] w = {0}> { y = Add(x, w) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    model.graph.initializers["w"].const_value = ir.tensor(weights, name="w")
    shown: list[Path] = []

    def refuse(path: Path) -> None:
        shown.append(path)
        assert load(path).graph.initializers["w"].const_value.numpy().tolist() == weights.tolist()
        raise UsageError("no")

    target = tmp_path / "model.onnx"
    target.write_bytes(b"older")
    with pytest.raises(UsageError, match="no"):
        save(model, target, external_data=external_data, accept=refuse)
    assert target.read_bytes() == b"older"
    assert sorted(tmp_path.iterdir()) == [target]
    assert shown[0].parent != tmp_path
    save(model, target, external_data=external_data, accept=shown.append)
    assert load(target).graph.initializers["w"].const_value.numpy().tolist() == weights.tolist()
