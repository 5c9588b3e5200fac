"""A model run piece by piece gives what it gives as a whole, in memory that doesn't grow with its layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calibration.small_models import HIDDEN, activations, parse, residual, value
from graphopt.calibration.calibration import Calibration
from graphopt.calibration.data import ArrayDataset
from graphopt.calibration.patches import Patches
from graphopt.calibration.pieces import cut
from graphopt.calibration.request import Request
from graphopt.calibration.stages import Stage, _Run, stages
from graphopt.calibration.statistics import AbsMax, MeanVariance, SecondMoment
from graphopt.errors import InputDataError, UsageError

RNG = np.random.default_rng(1)
FEEDS = [{"x": RNG.normal(size=(2, 5, HIDDEN)).astype(np.float32)} for _ in range(3)]
DATA = ArrayDataset(FEEDS)


def moment(arrays: list[np.ndarray]) -> np.ndarray:
    rows = np.concatenate([a.reshape(-1, a.shape[-1]) for a in arrays]).astype(np.float64)
    return rows.T @ rows / len(rows)


def tensor(array: np.ndarray) -> ir.TensorProtocol:
    return ir.tensor(np.ascontiguousarray(array, dtype=np.float32))


@settings(max_examples=20, deadline=None)
@given(
    layers=st.integers(1, 6),
    piece_bytes=st.sampled_from([1, 2_000, 1 << 20]),
    budget=st.sampled_from([0, 500, 1 << 20]),
    sequential=st.booleans(),
    grain=st.sampled_from(["layer", "site"]),
)
def test_piece_by_piece_is_the_whole(layers: int, piece_bytes: int, budget: int, sequential: bool, grain: str) -> None:
    model = residual(layers)
    names = ["x", *(f"{kind}{i}" for i in range(layers) for kind in "xt"), f"x{layers}"]
    requests = {name: Request(value(model, name), SecondMoment()) for name in names}
    run = stages(
        model, list(requests.values()), DATA, sequential=sequential, grain=grain,  # type: ignore[arg-type]
        piece_bytes=piece_bytes, budget_bytes=budget,
    )  # fmt: skip
    found = {}
    for stage in run:
        assert not set(found) & set(stage.summaries)
        found.update(stage.summaries)
    expected = activations(model, FEEDS, names)
    for name, request in requests.items():
        np.testing.assert_allclose(found[request].array, moment(expected[name]), rtol=1e-5, atol=1e-6, err_msg=name)
        assert found[request].rows == 30


def test_pieces_are_cut_where_little_crosses() -> None:
    model = residual(4)
    wanted = {value(model, f"t{i}"): 0 for i in range(4)}
    pieces = cut(model, wanted, limit_bytes=1)
    assert [[v.name for v in piece.leaving] for piece in pieces] == [["x1"], ["x2"], ["x3"], []]
    assert [[v.name for v in piece.weights] for piece in pieces[:3]] == [["a0", "b0"], ["a1", "b1"], ["a2", "b2"]]
    # What only makes outputs that nobody looks at isn't run.
    assert [v.name for v in pieces[-1].weights] == ["a3"]
    two = 2 * sum(v.const_value.nbytes for v in pieces[0].weights if v.const_value is not None)
    assert len(cut(model, wanted, limit_bytes=two)) == 2


def test_a_sequential_run_sees_changed_weights_and_another_one_does_not() -> None:
    names = [f"{kind}{i}" for i in range(4) for kind in "xt"]

    def shrink(model: ir.Model, stage: Stage) -> None:
        for weight in stage.weights:
            assert weight.const_value is not None
            weight.const_value = tensor(weight.const_value.numpy() * 0.5)

    before = activations(residual(4), FEEDS, names)
    for sequential in (False, True):
        model = residual(4)
        requests = {name: Request(value(model, name), SecondMoment()) for name in names}
        for stage in stages(model, list(requests.values()), DATA, sequential=sequential, piece_bytes=1):
            after = activations(model, FEEDS, names)
            for name, request in requests.items():
                if request in stage.summaries:
                    expected = after if sequential else before
                    np.testing.assert_allclose(stage[request].array, moment(expected[name]), rtol=1e-5, atol=1e-6)
            shrink(model, stage)


def test_a_sequential_run_by_sites_sees_all_weights_before_each() -> None:
    model = residual(3)
    requests = [Request(value(model, f"{kind}{i}"), SecondMoment()) for i in range(3) for kind in "xt"]
    count = 0
    for stage in stages(model, requests, DATA, sequential=True, grain="site"):
        ((request, summary),) = stage.summaries.items()
        name = request.value.name or ""
        expected = activations(model, FEEDS, [name])[name]
        np.testing.assert_allclose(summary.array, moment(expected), rtol=1e-5, atol=1e-6)
        weight = model.graph.initializers[{"x": "a", "t": "b"}[name[0]] + name[1:]]
        assert weight.const_value is not None
        weight.const_value = tensor(weight.const_value.numpy() + 0.1)
        count += 1
    assert count == 6


def test_a_sequential_run_by_sites_runs_no_weight_before_it_changed() -> None:
    model, said = residual(3), []
    requests = [Request(value(model, f"{kind}{i}"), SecondMoment()) for i in range(3) for kind in "xt"]
    data = Calibration(DATA, progress=lambda what, done, count: said.append(what))
    for stage in data.stages(model, requests, sequential=True, grain="site"):
        for request in stage.summaries:
            name = request.value.name or ""
            weight = model.graph.initializers[{"x": "a", "t": "b"}[name[0]] + name[1:]]
            assert weight.const_value is not None
            weight.const_value = tensor(weight.const_value.numpy() + 0.1)
    # x0 is computed again wherever it is read, so that it is seen with the first weight, not before it.
    assert said.count("calibrating again") == len(FEEDS)


def test_what_is_computed_from_the_inputs_alone_is_one_piece() -> None:
    model = parse("g (float[b, 8] x) => (float[b, 8] y) { u = Relu(x) y = Neg(u) }", {})
    request = Request(value(model, "u"), SecondMoment())
    feeds = [{"x": RNG.normal(size=(4, 8)).astype(np.float32)}]
    (stage,) = stages(model, [request], ArrayDataset(feeds), sequential=True)
    np.testing.assert_allclose(stage[request].array, moment([np.maximum(feeds[0]["x"], 0)]), rtol=1e-5)


def test_memory_does_not_grow_with_the_layers() -> None:
    peaks = []
    for layers in (3, 30):
        model = residual(layers)
        requests = [Request(value(model, f"t{i}"), SecondMoment()) for i in range(layers)]
        run = _Run(model, requests, DATA, budget_bytes=0)
        run.plan("layer", 1)
        for _ in run.stages():
            pass
        assert len(run.pieces) == layers
        peaks.append(run.samples.carried.peak_bytes)
        run.samples.close()
    sample = FEEDS[0]["x"].nbytes
    assert peaks[0] == peaks[1] <= (2 * len(FEEDS) + 1) * sample


SHARED = """
g (int64[b, t] input_ids, int64[b, t] attention_mask, int64[b, t] position_ids) => (float[b, t, 1000] logits) {
    f = Cast<to = 1>(position_ids) wide = Unsqueeze(f, last) angle = Mul(wide, frequencies)
    c = Cos(angle) s = Sin(angle)
    k = Cast<to = 1>(attention_mask) less = Sub(k, unit) bias = Mul(less, many)
    row = Unsqueeze(bias, middle) none = Sub(k, k) column = Unsqueeze(none, outer) mask = Add(row, column)
    x0 = Gather(table, input_ids)
    m0 = MatMul(x0, w0) r0 = Mul(m0, c) n0 = Mul(m0, s) q0 = Add(r0, n0) a0 = Attention<q_num_heads = 1, kv_num_heads = 1>(q0, q0, m0, mask) x1 = Add(x0, a0)
    m1 = MatMul(x1, w1) r1 = Mul(m1, c) n1 = Mul(m1, s) q1 = Add(r1, n1) a1 = Attention<q_num_heads = 1, kv_num_heads = 1>(q1, q1, m1, mask) x2 = Add(x1, a1)
    m2 = MatMul(x2, w0) r2 = Mul(m2, c) n2 = Mul(m2, s) q2 = Add(r2, n2) a2 = Attention<q_num_heads = 1, kv_num_heads = 1>(q2, q2, m2, mask) x3 = Add(x2, a2)
    turned = Transpose<perm = [1, 0]>(table) logits = MatMul(x3, turned)
}"""  # fmt: skip


def shared() -> ir.Model:
    rng = np.random.default_rng(2)
    weights = {
        "frequencies": np.linspace(0.1, 1, 6), "unit": np.float32(1), "many": np.float32(1e4),
        "table": rng.normal(size=(1000, 6)), "w0": rng.normal(size=(6, 6)), "w1": rng.normal(size=(6, 6)),
    }  # fmt: skip
    weights = {name: np.asarray(array, np.float32) for name, array in weights.items()}
    return parse(
        SHARED,
        {**weights, "last": np.asarray([-1]), "middle": np.asarray([1, 2]), "outer": np.asarray([1, 3])},
        opset=23,
    )


def tokens(padded: bool) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(3)
    made = []
    for _ in range(2):
        mask = np.ones((2, 7), np.int64)
        mask[1, 5:] = not padded
        made.append(
            {
                "input_ids": rng.integers(0, 1000, (2, 7)),
                "attention_mask": mask,
                "position_ids": np.arange(14).reshape(2, 7),
            }
        )
    return made


def test_shared_tables_masks_and_tied_weights() -> None:
    """Tables and masks are made again in every piece, and a tied weight is read in several."""
    model, feeds = shared(), tokens(padded=False)
    names = ["x0", "x1", "x2", "x3", "mask", "c"]
    requests = {name: Request(value(model, name), MeanVariance()) for name in names}
    found = {}
    run = _Run(model, list(requests.values()), ArrayDataset(feeds))
    run.plan("layer", 1)
    for stage in run.stages():
        found.update(stage.summaries)
    entering = [{v.name for v in piece.entering} for piece in run.pieces]
    assert len(entering) >= 3
    assert all(names <= {"x0", "x1", "x2", "x3"} for names in entering)
    assert sum("w0" in {w.name for w in piece.weights} for piece in run.pieces) == 2
    expected = activations(model, feeds, names)
    for name, request in requests.items():
        rows = np.concatenate([a.reshape(-1, a.shape[-1]) for a in expected[name]])
        np.testing.assert_allclose(found[request]["mean"], rows.mean(axis=0), rtol=1e-4, atol=1e-4)


def test_padding_does_not_count() -> None:
    model, feeds = shared(), tokens(padded=True)
    request = Request(value(model, "x2"), SecondMoment())
    found = Calibration(ArrayDataset(feeds)).gather(model, [request])[request]
    kept = [a[f["attention_mask"] != 0] for a, f in zip(activations(model, feeds, ["x2"])["x2"], feeds, strict=True)]
    assert found.rows == 24
    np.testing.assert_allclose(found.array, moment(kept), rtol=1e-5, atol=1e-5)


NESTED = """
g (float[b, 4] x, bool flag, int64 trips) => (float[b, 4] y) {
    u = MatMul(x, w0)
    v = If (flag) <
        then_branch = yes () => (float[b, 4] p) { p = MatMul(u, w1) },
        else_branch = no () => (float[b, 4] q) { q = Add(u, x) }
    >
    z = Tanh(v)
    last = Loop (trips, flag, z) <
        body = step (int64 i, bool go, float[b, 4] s) => (bool on, float[b, 4] n) { on = Identity(go) t = MatMul(s, w1) n = Add(t, u) }
    >
    y = MatMul(last, w0)
}"""


def test_subgraphs_are_kept_whole() -> None:
    rng = np.random.default_rng(4)
    model = parse(NESTED, {f"w{i}": (rng.normal(size=(4, 4)) / 2).astype(np.float32) for i in range(2)})
    for flag in (False, True):
        feeds = [
            {"x": rng.normal(size=(3, 4)).astype(np.float32), "flag": np.asarray(flag), "trips": np.asarray(2)}
            for _ in range(2)
        ]
        requests = {name: Request(value(model, name), AbsMax()) for name in ("x", "u", "v", "z", "last", "y")}
        all_stages = list(stages(model, list(requests.values()), ArrayDataset(feeds), piece_bytes=1, grain="site"))
        assert len(all_stages) > 2
        expected = activations(model, feeds, list(requests))
        for stage in all_stages:
            for request, summary in stage.summaries.items():
                arrays = expected[request.value.name or ""]
                assert float(summary.array) == pytest.approx(max(np.abs(a).max() for a in arrays), rel=1e-5)


def test_a_sequence_is_not_cut_through() -> None:
    text = """g (float[b, 4] x) => (float[b, 4] y) {
        u = MatMul(x, w) s = SequenceConstruct(u, x) v = MatMul(u, w) i = Constant<value_int = 0>()
        t = SequenceAt(s, i) z = Add(t, v) y = MatMul(z, w) }"""
    model = parse(text, {"w": np.eye(4, dtype=np.float32)})
    requests = [Request(value(model, name), AbsMax()) for name in ("u", "v", "t", "z", "y")]
    data = ArrayDataset([{"x": np.ones((1, 4), np.float32)}])
    found = [
        s.array
        for stage in stages(model, requests, data, piece_bytes=1, grain="site")
        for s in stage.summaries.values()
    ]
    assert [float(a) for a in found] == [1, 1, 1, 2, 2]


def test_images_have_their_channels_in_front() -> None:
    rng = np.random.default_rng(5)
    model = parse(
        "g (float[b, 3, h, w] x) => (float[b, 4, h, w] y) { y = Conv(x, k) }",
        {"k": rng.normal(size=(4, 3, 1, 1)).astype(np.float32)},
    )
    feeds = [{"x": rng.normal(size=(2, 3, 4, 5)).astype(np.float32)}]
    request = Request(value(model, "x"), AbsMax(True), channel_axis=1)
    found = Calibration(ArrayDataset(feeds)).gather(model, [request])[request]
    np.testing.assert_array_equal(found.array, np.abs(feeds[0]["x"]).max(axis=(0, 2, 3)))


@pytest.mark.parametrize(
    "attributes",
    [
        "pads = [1, 0, 2, 1], strides = [2, 1]",
        "dilations = [2, 1]",
        'auto_pad = "SAME_UPPER", strides = [2, 2]',
        'auto_pad = "SAME_LOWER"',
        'auto_pad = "VALID"',
    ],
)
def test_patches_of_a_convolution(attributes: str) -> None:
    rng = np.random.default_rng(6)
    kernel = rng.normal(size=(4, 3, 2, 3)).astype(np.float32)
    model = parse(f"g (float[b, 3, h, w] x) => (float[b, 4, i, j] y) {{ y = Conv<{attributes}>(x, k) }}", {"k": kernel})
    node = value(model, "y").producer()
    assert node is not None
    patches = Patches.of_node(node)
    assert patches is not None
    feeds = [{"x": rng.normal(size=(2, 3, 7, 6)).astype(np.float32)} for _ in range(2)]
    made = patches.of(feeds[0]["x"]) @ kernel.reshape(4, -1).T
    np.testing.assert_allclose(made.transpose(0, 3, 1, 2), activations(model, feeds, ["y"])["y"][0], atol=1e-5)
    request = Request(value(model, "x"), SecondMoment(), patches=patches)
    found = Calibration(ArrayDataset(feeds)).gather(model, [request])[request]
    np.testing.assert_allclose(found.array, moment([patches.of(one["x"]) for one in feeds]), rtol=1e-5, atol=1e-5)


def test_no_patches() -> None:
    model = residual(1)
    assert Patches.of_node(next(iter(model.graph))) is None
    model = parse(
        "g (float[b, 4, h, w] x) => (float[b, 4, h, w] y) { y = Conv<group = 2>(x, k) }",
        {"k": np.zeros((4, 2, 1, 1), np.float32)},
    )
    assert Patches.of_node(next(iter(model.graph))) is None


def test_what_cannot_be_observed() -> None:
    model = residual(2)
    with pytest.raises(UsageError, match="'a0' can't be observed"):
        list(stages(model, [Request(model.graph.initializers["a0"], AbsMax())], DATA))
    with pytest.raises(UsageError, match="can't be observed"):
        list(stages(model, [Request(value(residual(2), "x1"), AbsMax())], DATA))
    assert list(stages(model, [], DATA)) == []


def test_inputs_with_defaults_keep_them() -> None:
    model = residual(2)
    model.graph.inputs.append(model.graph.initializers["b0"])
    request = Request(value(model, "x1"), SecondMoment())
    found = Calibration(DATA).gather(model, [request])[request]
    np.testing.assert_allclose(found.array, moment(activations(residual(2), FEEDS, ["x1"])["x1"]), rtol=1e-5, atol=1e-6)
    default = model.graph.initializers["b0"].const_value
    assert default is not None
    with pytest.raises(InputDataError, match="'b0' has a default"):
        Calibration(ArrayDataset([{**FEEDS[0], "b0": default.numpy()}])).gather(model, [request])


def test_data_that_does_not_run() -> None:
    model = residual(2)
    model.graph.inputs[0].shape = None
    wrong = ArrayDataset([{"x": np.ones((2, HIDDEN + 1), np.float32)}])
    with pytest.raises(InputDataError, match="doesn't run on sample 1"):
        list(stages(model, [Request(value(model, "x1"), AbsMax())], wrong))


def test_cached_stages_are_read_and_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    def requests(model: ir.Model) -> list[Request]:
        return [Request(value(model, f"t{i}"), SecondMoment()) for i in range(5)]

    steps: list[str] = []

    def run(
        model: ir.Model, stop: int | None = None, sequential: bool = False, data: ArrayDataset = DATA
    ) -> list[np.ndarray]:
        steps.clear()
        found = []
        asked = requests(model)
        for stage in stages(
            model, asked, data, sequential=sequential, piece_bytes=1, cache=tmp_path,
            progress=lambda what, done, count: steps.append(what),
        ):  # fmt: skip
            found += [summary.array for summary in stage.summaries.values()]
            if sequential:
                for weight in stage.weights:
                    assert weight.const_value is not None
                    weight.const_value = tensor(np.round(weight.const_value.numpy(), 1))
            if stage.index == stop:
                break
        return found

    count = len(FEEDS)
    first = run(residual(5), stop=2)
    assert steps == ["calibrating"] * 3 * count
    whole = run(residual(5))
    assert steps == ["calibrating again"] * 3 * count + ["calibrating"] * 2 * count
    again = run(residual(5))
    assert steps == []
    for left, right in ((first, whole[:3]), (whole, again)):
        np.testing.assert_array_equal(left, right)
    # Other weights, other data and another request are other stages.
    run(residual(5, seed=1), stop=0)
    assert steps == ["calibrating"] * count
    run(residual(5), stop=0, data=ArrayDataset(FEEDS[:1]))
    assert steps == ["calibrating"]
    # A sequential run starts with the same piece, and goes on with others.
    run(residual(5), stop=2, sequential=True)
    assert steps.count("calibrating") == 2 * count
    changed = run(residual(5), sequential=True)
    assert steps.count("calibrating") == 2 * count
    np.testing.assert_array_equal(changed, run(residual(5), sequential=True))
    assert steps == []
    assert np.abs(np.asarray(changed[3]) - whole[3]).max() > 1e-4
    # What isn't whole is made again.
    for path in tmp_path.glob("*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    np.testing.assert_array_equal(run(residual(5)), whole)


def test_what_was_cached_longest_ago_is_removed(tmp_path: Path) -> None:
    """But the first stages of a run that goes on stay, behind which an interrupted one begins."""
    from graphopt.calibration.cache import StageCache
    from graphopt.calibration.statistics import Summary

    kept = [Summary({"a": np.zeros(500, np.float32)}, 1, 1.0, 0)]

    def run(data: str, stages: int) -> list[bool]:
        cache, found = StageCache(tmp_path, data, most_bytes=6000), []
        for seed in range(stages):
            cache.enter(residual(1, seed=seed), [])
            found.append(cache.load() is not None)
            if not found[-1]:
                cache.save(kept, [])
        return found

    assert run("one", 4) == [False] * 4
    assert run("one", 4) == [True, True, False, False]
    assert run("another", 1) == [False]
    assert run("another", 1) == [True]
    assert len(list(tmp_path.glob("*.npz"))) == 2
