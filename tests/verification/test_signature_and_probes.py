from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from graphopt.errors import InputDataError, VerificationError
from graphopt.graph.assumptions import Assumptions
from graphopt.verification.input_ranges import integer_uses
from graphopt.verification.probes import load_probes, make_probes
from graphopt.verification.signature import Expression, signature
from graphopt.verification.usable import usable_probes


def model(text: str, opset: int = 17, seed: int = 0) -> ir.Model:
    """A model from ONNX text; values that are declared in <...> but made by nothing become random weights."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": {opset}]>\n' + text)
    rng = np.random.default_rng(seed)
    made = {name for node in proto.graph.node for name in node.output}
    for value in proto.graph.value_info:
        if value.name not in made:
            shape = [d.dim_value for d in value.type.tensor_type.shape.dim]
            array = rng.normal(size=shape).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    return ir.from_proto(proto)


ENCODER = """
e (int64[batch, seq] input_ids, int64[batch, seq] attention_mask, int64[batch, seq] token_type_ids)
  => (float[batch, seq, 4] y)
<float[50, 4] words, float[2, 4] types, float one = {1.0}, int64[1] axis = {2}> {
  w = Gather(words, input_ids)
  t = Gather(types, token_type_ids)
  sum = Add(w, t)
  m = Cast<to = 1>(attention_mask)
  inverse = Sub(one, m)
  column = Unsqueeze(inverse, axis)
  y = Mul(sum, column)
}
"""


def encoder() -> ir.Model:
    return model(ENCODER)


def decoder(mask: str = "total", past: str = "past") -> ir.Model:
    """Embedding, a running mean over the cache, logits; the cache comes back longer."""
    return model(
        f"""
d (int64[batch, seq] input_ids, int64[batch, {mask}] attention_mask, float[batch, {past}, 4] past_key)
  => (float[batch, seq, 9] logits, float[batch, all, 4] present)
<float[9, 4] table, float[4, 9] head, int64[1] two = {{2}}, int64[1] one = {{1}}> {{
  x = Gather(table, input_ids)
  present = Concat<axis = 1>(past_key, x)
  m = Cast<to = 1>(attention_mask)
  column = Unsqueeze(m, two)
  masked = Mul(present, column)
  mean = ReduceMean<axes = [1]>(masked)
  sum = Add(x, mean)
  logits = MatMul(sum, head)
}}"""
    )


class TestIntegerUses:
    def test_vocabulary_through_arithmetic_and_reshapes(self) -> None:
        m = model("""
g (int64[n] ids) => (float[n, 2] y) <float[10, 2] table, int64 three = {3}, int64[2] shape = {-1, 1}> {
  shifted = Add(ids, three)
  column = Reshape(shifted, shape)
  rows = GatherND(table, column)
  y = Identity(rows)
}""")
        assert integer_uses(m)["ids"].limit == 7

    def test_mask_position_and_comparison(self) -> None:
        uses = integer_uses(encoder())
        assert uses["input_ids"].limit == 50
        assert uses["token_type_ids"].limit == 2
        assert uses["attention_mask"].masks
        assert uses["attention_mask"].limit is None
        m = model("""
g (int64[n] position, int64 rate) => (float[n] y, bool b) <float f = {0.5}, int64 k = {16000}> {
  p = Cast<to = 1>(position)
  angle = Mul(p, f)
  y = Sin(angle)
  b = Equal(k, rate)
}""")
        uses = integer_uses(m)
        assert uses["position"].positions
        assert uses["rate"].compared == (16000.0,)

    def test_into_subgraphs_and_out_of_them(self) -> None:
        m = model("""
g (bool c, int64[n] ids) => (float[n, 2] y) <float[10, 2] table> {
  kept = If (c) <
    then_branch = a () => (int64[n] r) { r = Identity(ids) },
    else_branch = b () => (int64[n] q) { q = Neg(ids) }
  >
  y = Gather(table, kept)
}""")
        assert integer_uses(m)["ids"].limit == 10

    def test_into_functions(self) -> None:
        proto = onnx.parser.parse_model("""
<ir_version: 8, opset_import: ["": 17, "local": 1]>
g (int64[n] ids) => (float[n, 2] y) <float[10, 2] table> { y = local.look(table, ids) }
<domain: "local", opset_import: ["": 17]> look (t, i) => (o) { o = Gather(t, i) }
""")
        m = ir.from_proto(proto)
        # The table's length isn't known inside the body, so there is no limit, but nothing fails either.
        assert integer_uses(m)["ids"].limit is None

    def test_one_hot_by_comparison(self) -> None:
        m = model("""
g (int64[n, 1] bytes) => (bool[n, 4] y) <int64[4] classes = {0, 1, 2, 3}> { y = Equal(bytes, classes) }""")
        assert integer_uses(m)["bytes"].limit == 4


class TestSignature:
    def test_roles_and_variables(self) -> None:
        shape = signature(encoder())
        assert [i.role for i in shape.inputs] == ["index", "mask", "index"]
        assert shape.variables == {"batch": "batch", "seq": "sequence"}

    @pytest.mark.parametrize("mask", ["total", "past + seq", "s53"])
    def test_decoder_mask_covers_past_and_new(self, mask: str) -> None:
        shape = signature(decoder("total"))
        if mask != "total":
            m = decoder()
            m.graph.inputs[1].shape = ir.Shape(["batch", mask])
            shape = signature(m)
        assert shape.decodes
        item = next(i for i in shape.inputs if i.role == "mask")
        assert isinstance(item.dims[1], Expression)
        assert item.shape({"batch": 2, "seq": 3, "past": 5}) == (2, 8)

    def test_unlike_symbols_of_caches_and_batches_go_together(self) -> None:
        m = decoder()
        m.graph.inputs[1].shape = ir.Shape(["s1", "s2"])
        m.graph.inputs[2].shape = ir.Shape(["s3", "s4", 4])
        assert sorted(signature(m).variables.values()) == ["batch", "past", "sequence"]

    def test_hyphen_in_a_symbol_is_no_difference(self) -> None:
        m = model("g (float[batch-size, 3] x) => (float[n, 3] y) { y = Relu(x) }".replace("batch-size", "b"))
        m.graph.inputs[0].shape = ir.Shape(["batch-size", 3])
        assert signature(m).variables == {"batch-size": "batch"}

    def test_recurrent_state_shares_the_batch(self) -> None:
        m = model("g (float[a, b] x, float[2, c, 8] state) => (float[a, b] y) { y = Relu(x) z = Relu(state) }")
        m.graph.inputs[0].shape = ir.Shape([None, None])
        m.graph.inputs[1].shape = ir.Shape([2, None, 8])
        shape = signature(m)
        assert shape.inputs[1].dims[1] == shape.inputs[0].dims[0]

    def test_sequence_input_is_refused(self) -> None:
        m = model("g (seq(float[n]) x, int64 i) => (float[n] y) { y = SequenceAt(x, i) }")
        with pytest.raises(VerificationError, match="'x' is no tensor"):
            signature(m)

    def test_overridable_initializer_is_not_fed(self) -> None:
        m = model("g (float[n] x, float[1] w) => (float[n] y) <float[1] w = {2.0}> { y = Mul(x, w) }")
        assert [i.name for i in signature(m).inputs] == ["x"]


class TestProbes:
    def test_encoder(self) -> None:
        probes = make_probes(encoder())
        names = [p.name for p in probes]
        assert names == ["noise", "batch, noise", "left padding", "right padding", "length 1"]
        ids = np.concatenate([p.feeds["input_ids"].ravel() for p in probes])
        assert ids.min() >= 0
        assert 40 < ids.max() < 50
        assert {p.feeds["input_ids"].shape for p in probes} == {(1, 8), (3, 13), (3, 8), (1, 1)}
        assert set(np.concatenate([p.feeds["token_type_ids"].ravel() for p in probes])) == {0, 1}
        left, right = (probes[i].feeds["attention_mask"] for i in (2, 3))
        assert left[:, -1].all()
        assert right[:, 0].all()
        assert left[1:, 0].sum() == 0
        assert right[1:, -1].sum() == 0
        assert left[0].all()

    def test_decoder(self) -> None:
        probes = {p.name: p for p in make_probes(decoder())}
        assert probes["prefill"].feeds["past_key"].shape == (1, 0, 4)
        assert probes["decode, batch"].feeds["past_key"].shape == (3, 8, 4)
        assert probes["decode, batch"].feeds["input_ids"].shape == (3, 1)
        for probe in probes.values():
            mask = probe.feeds["attention_mask"]
            assert mask.shape[1] == probe.feeds["past_key"].shape[1] + probe.feeds["input_ids"].shape[1]
            assert mask.any(axis=1).all()
        good, bad = usable_probes(decoder(), list(probes.values()))
        assert len(good) == len(probes) == 10
        assert not bad

    def test_image_sizes_are_multiples_of_32_and_differ(self) -> None:
        probes = make_probes(model("g (float[b, 3, h, w] x) => (float[b, 3, h, w] y) { y = Relu(x) }"))
        assert [p.feeds["x"].shape for p in probes] == [(1, 3, 64, 96), (3, 3, 128, 64), (1, 3, 64, 96)]
        assert probes[2].name == "zeros"
        assert not probes[2].feeds["x"].any()

    def test_compared_scalar_gets_a_probe_for_each_branch(self) -> None:
        m = model(
            "g (float[n] x, int64 sr) => (float[n] y) <int64 k = {16000}> { b = Equal(sr, k) y = Where(b, x, x) }"
        )
        assert {int(p.feeds["sr"]) for p in make_probes(m)} == {16000, 8000}

    def test_positions_count_on_from_the_past(self) -> None:
        m = decoder()
        positions = ir.Value(
            name="position_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "seq"])
        )
        m.graph.inputs.append(positions)
        chunk = next(p for p in make_probes(m) if p.name == "chunk")
        assert chunk.feeds["position_ids"].tolist() == [[7, 8, 9, 10]]

    def test_a_decoder_is_probed_with_batches_and_padding_at_every_stage(self) -> None:
        def rows(name: str) -> list[list[int]]:
            return probes[name].feeds["attention_mask"].tolist()

        probes = {p.name: p for p in make_probes(decoder())}
        assert [name for name in probes if name.startswith("chunk")] == [
            "chunk",
            "chunk, left padding",
            "chunk, right padding",
        ]
        full = [1] * 11
        assert rows("chunk") == [full]
        assert rows("chunk, left padding") == [full, [0] * 2 + [1] * 9, [0] * 5 + [1] * 6]
        # What was in the cache is whole; only of what is new is the end padding.
        assert rows("chunk, right padding") == [full, [1] * 10 + [0], [1] * 9 + [0] * 2]
        assert rows("decode, batch") == [[1] * 9] * 3
        assert rows("decode, left padding")[1:] == [[0] * 2 + [1] * 7, [0] * 4 + [1] * 5]
        unpadded = make_probes(decoder(), assumptions=Assumptions.parse(["no-padding"]))
        chunk = next(p for p in unpadded if p.name == "chunk, batch")
        assert chunk.feeds["attention_mask"].tolist() == [full] * 3

    def test_padding_of_one_row_where_chunks_are_of_one(self) -> None:
        for name in ("batch=1", "no-batched-chunks"):
            probes = {p.name: p for p in make_probes(decoder(), assumptions=Assumptions.parse([name]))}
            left, right = (
                probes[f"chunk of one, {side} padding"].feeds["attention_mask"] for side in ("left", "right")
            )
            assert left.tolist() == [[0] * 3 + [1] * 8]
            assert right.tolist() == [[1] * 10 + [0]]

    def test_no_probe_is_longer_than_assumed_and_one_is_as_long(self) -> None:
        for length in (1, 2, 5, 8, 13, 14, 40):
            probes = make_probes(decoder(), assumptions=Assumptions.parse([f"max-length={length}"]))
            totals = [p.feeds["attention_mask"].shape[1] for p in probes]
            assert max(totals) == length
            good, bad = usable_probes(decoder(), probes)
            assert len(good) == len(probes)
            assert not bad
        # A cache of gigabytes isn't made for that.
        probes = make_probes(decoder(), assumptions=Assumptions.parse(["max-length=1000000000"]))
        assert max(p.feeds["attention_mask"].shape[1] for p in probes) == 14
        encoded = make_probes(encoder(), assumptions=Assumptions.parse(["max-length=5"]))
        assert max(p.feeds["input_ids"].shape[1] for p in encoded) == 5

    def test_positions_go_by_the_mask(self) -> None:
        m = decoder()
        m.graph.inputs.append(
            ir.Value(name="position_ids", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["batch", "seq"]))
        )
        probes = {p.name: p for p in make_probes(m)}

        def positions(name: str) -> list[list[int]]:
            return probes[name].feeds["position_ids"].tolist()

        assert positions("chunk, left padding") == [[7, 8, 9, 10], [5, 6, 7, 8], [2, 3, 4, 5]]
        assert positions("prefill, left padding")[1] == [0, 0, 0, 1, 2, 3, 4, 5]
        assert positions("decode, left padding") == [[8], [6], [4]]
        assert positions("decode, batch") == [[8], [8], [8]]
        assert positions("chunk, right padding")[0] == [7, 8, 9, 10]
        # Positions are inputs of their own, which need not count from the cache.
        assert [row[0] for row in positions("prefill, other positions")] == [2, 4, 6]
        assert "positions of each row 2 later" in probes["prefill, other positions"].description
        alone = make_probes(m, assumptions=Assumptions.parse(["batch=1"]))
        assert next(p for p in alone if "other" in p.name).feeds["position_ids"].tolist() == [[2, 3, 4, 5]]
        assert not any("other" in p.name for p in make_probes(decoder()))

    def test_padding_token_that_the_graph_compares_with(self) -> None:
        m = model("""
g (int64[b, s] ids) => (float[b, s, 2] y, bool[b, s] pad) <float[50, 2] table, int64 one = {1}> {
  y = Gather(table, ids) pad = Equal(ids, one) }""")
        left = next(p for p in make_probes(m) if p.name == "left padding")
        assert (left.feeds["ids"][2, :4] == 1).all()

    def test_deterministic(self) -> None:
        first, second, other = make_probes(encoder(), 1), make_probes(encoder(), 1), make_probes(encoder(), 2)
        for a, b, c in zip(first, second, other, strict=True):
            assert all((a.feeds[n] == b.feeds[n]).all() for n in a.feeds)
            assert a.feeds["input_ids"].size < 4 or (a.feeds["input_ids"] != c.feeds["input_ids"]).any()


class TestUsable:
    def test_same_symbol_for_different_sizes(self) -> None:
        m = model("g (float[n, n] x, float[n, n] z) => (float y) <float[32, 4] w> { p = MatMul(x, w) y = Add(p, z) }")
        m.graph.outputs[0].shape = None
        good, bad = usable_probes(m, make_probes(m))
        assert good
        assert not bad
        assert all(p.feeds["x"].shape[1] == 32 for p in good)

    def test_only_size_of_a_dynamic_dimension(self) -> None:
        m = model("g (float[b, n] x) => (float[b, m] y) <float[576, 2] w> { y = MatMul(x, w) }")
        good, bad = usable_probes(m, make_probes(m))
        assert [p.feeds["x"].shape for p in good] == [(1, 576), (3, 576), (1, 576)]
        assert not bad

    def test_none_usable_tells_the_remedy(self) -> None:
        m = model("g (float[b, n] x) => (float[b, m] y) <float[577, 2] w> { y = MatMul(x, w) }")
        with pytest.raises(VerificationError, match=r"--inputs FILE.npz.*MatMul"):
            usable_probes(m, make_probes(m))


class TestLoadProbes:
    def test_reads_what_fits(self, tmp_path) -> None:
        x = np.ones((2, 3), np.float32)
        np.savez(tmp_path / "in.npz", x=x)
        m = model("g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }")
        (probe,) = load_probes(tmp_path / "in.npz", m)
        assert probe.recipe is None
        assert (probe.feeds["x"] == x).all()

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"z": np.ones((2, 3), np.float32)}, "holds 'z', but the model's inputs are 'x'"),
            ({}, "lacks the input 'x'"),
            ({"x": np.ones((2, 3))}, "takes float32, not float64"),
            ({"x": np.ones((2, 4), np.float32)}, r"takes the shape .* has \[2, 4\]"),
            ({"x": np.ones(3, np.float32)}, r"takes the shape .* has \[3\]"),
        ],
    )
    def test_refuses_what_does_not(self, tmp_path, arrays, message) -> None:
        np.savez(tmp_path / "in.npz", **arrays)
        m = model("g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }")
        with pytest.raises(InputDataError, match=message):
            load_probes(tmp_path / "in.npz", m)

    @pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04broken"])
    def test_refuses_other_files(self, tmp_path, content) -> None:
        (tmp_path / "in.npz").write_bytes(content)
        m = model("g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }")
        with pytest.raises(InputDataError, match=r"is not an .npz file; write it with numpy.savez"):
            load_probes(tmp_path / "in.npz", m)

    def test_refuses_one_array_alone_and_no_file(self, tmp_path) -> None:
        m = model("g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }")
        np.save(tmp_path / "one.npy", np.ones((2, 3), np.float32))
        with pytest.raises(InputDataError, match=r"is not an .npz file"):
            load_probes(tmp_path / "one.npy", m)
        with pytest.raises(InputDataError, match=r"missing.npz can't be read: No such file or directory\.$"):
            load_probes(tmp_path / "missing.npz", m)
