"""share-heads: heads of attention that compute with the matrices of a similar head of another layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.analysis.shapes import infer
from graphopt.errors import UsageError
from graphopt.graph.computed import columns
from graphopt.graph.constants import constant_array, constant_tensor, initializer_bytes
from graphopt.graph.edits import Editor
from graphopt.passes.base import Guarantee, Pass
from graphopt.passes.depth.head_matrices import HeadGroup, Piece, head_groups

Matrices = Literal["qkv", "qk"]
Pair = tuple[HeadGroup, HeadGroup]
"""A group of heads, and the one whose matrices it gets."""
_Key = tuple[ir.Node, int]
"""A product and the first column of a piece of its weight."""


class ShareHeads(Pass):
    """Let heads compute with the matrices of the most similar head of another layer.

        [W_q W_k]_h := [W_q W_k]_g,   g = argmax cos([W_q W_k]_h, [W_q W_k]_g)

    A bank of heads takes the place of the matrices: each head that is used twice is an initializer of its own, and a
    layer's matrix is the Concat of its heads. **The file gets smaller by the heads that are shared; a running session
    doesn't**, since the Concat is computed when the model is loaded, and time stays as it is. The cache stays, too.

    Papers: Head-wise Shareable Attention for Large Language Models (DirectShare, without training). Measured on
    SmolLM2-135M (4 windows of 512 tokens, perplexity 22.95): one head in twenty shared with "qk" 26.5, with "qkv" 32.8;
    one in ten 30.9 and 36.7, for 5.3 and 6.6 of 539.5 MB. Its most similar heads have a cosine of 0.04: heads that were
    trained apart aren't alike. Loading takes as long as before, 1.0 s.

    1. A head of keys and values goes with all heads of queries that read it.
    2. Columns of a head are found by following them to the attention, so that joined products are parted, too. Biases
       go with their columns; norms of queries and keys, and positions, stay each layer's own.
    3. Pairs of heads of two layers are taken from the most similar down; the later head gets the matrices of the
       earlier one. A head that others share keeps its own, and one that has another's lends none.
    4. What was chosen is among the options that the report lists, as `pairs`.

    **Options:** `fraction` (default 0.05): of all heads of keys and values, how many get another's matrices; `matrices`
    (default "qk"): which, or "qkv"; `pairs` (default none): a head and its donor, by layer and head of keys and values,
    counted from 0, such as {"7.2": "3.0"}: nothing is compared then.

    **Needs:** a canonical graph; no data. **Guarantees:** LOSSY.

    **Left alone, with the reason:** an attention whose operands aren't made by one product with a plain matrix each, or
    whose matrix is read elsewhere, too.

    **When not to use it:** on a model whose heads aren't alike, which the cosines in the report show; before
    `quantize-weights`, which leaves a matrix alone that is put together when it is loaded.
    """

    name: ClassVar[str] = "share-heads"
    family: ClassVar[str] = "depth"
    guarantee: ClassVar[Guarantee] = Guarantee.LOSSY
    paper: ClassVar[str] = "Head-wise Shareable Attention for Large Language Models"

    def __init__(
        self, fraction: float = 0.05, matrices: Matrices = "qk", pairs: dict[str | float, str | float] | None = None
    ) -> None:
        super().__init__()
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1, not {fraction}")
        if matrices not in get_args(Matrices):
            raise ValueError(f"matrices is one of {', '.join(get_args(Matrices))}, not {matrices!r}")
        if pairs is not None and not isinstance(pairs, dict):
            raise ValueError(f'pairs gives a head its donor, such as {{"7.2": "3.0"}}, not {pairs!r}')
        self.fraction, self.matrices = fraction, matrices
        self.pairs = None if pairs is None else {str(head): str(donor) for head, donor in pairs.items()}
        self.saved = 0

    def apply(self, model: ir.Model) -> bool:
        """See the class."""
        groups, left = head_groups(model, infer(model, believe_names=True))
        for node, reason in left:
            self.left(node, reason)
        if self.pairs is not None:
            pairs, similar = self._given(groups, self.pairs), {}
        else:
            similar = dict(_most_similar(groups, math.floor(self.fraction * len(groups) + 0.5)))
            pairs = list(similar)
        before = initializer_bytes(model)
        _share([p for pair in pairs for p in self._pieces(*pair)], Editor(model))
        self.saved = before - initializer_bytes(model)
        for head, donor in pairs:
            cosine = f" (cosine {similar[head, donor]:.3f})" if similar else ""
            self.applied(head.site.node, f"head {head.name} has the matrices of head {donor.name}{cosine}")
        if pairs:
            last = pairs[-1][0].site.node
            self.applied(last, f"{self.saved} bytes less in the file; as many as before in a session")
        self.pairs = {head.name: donor.name for head, donor in pairs}
        return bool(pairs)

    def _given(self, groups: Sequence[HeadGroup], pairs: dict[str, str]) -> list[Pair]:
        known = {group.name: group for group in groups}
        found = []
        for names in pairs.items():
            if (missing := next((name for name in names if name not in known), None)) is not None:
                raise UsageError(f"share-heads: the model has no head {missing!r} whose matrices are known.")
            head, donor = (known[name] for name in names)
            if head.form != donor.form:
                raise UsageError(f"share-heads: the heads {head.name} and {donor.name} have matrices of other sizes.")
            if names[1] in pairs:
                raise UsageError(f"share-heads: the head {donor.name} has another's matrices itself.")
            found.append((head, donor))
        return found

    def _pieces(self, head: HeadGroup, donor: HeadGroup) -> Iterator[tuple[Piece, Piece]]:
        yield from zip(head.q, donor.q, strict=True)
        yield from zip(head.k, donor.k, strict=True)
        if self.matrices == "qkv":
            yield from zip(head.v, donor.v, strict=True)


def _most_similar(groups: Sequence[HeadGroup], count: int) -> list[tuple[Pair, float]]:
    """The most similar pairs of heads of different layers, each head in one role; two layers are in memory at once."""
    layers = [list(members) for _, members in itertools.groupby(groups, key=lambda group: group.layer)]
    found: list[tuple[float, int, int]] = []
    place = {group: number for number, group in enumerate(groups)}
    for number, layer in enumerate(layers):
        rows = _directions(layer)
        for other in layers[:number]:
            cosines = rows @ _directions(other).T if layer[0].form == other[0].form else None
            for (i, head), (j, donor) in itertools.product(enumerate(layer), enumerate(other)):
                if cosines is not None and head.form == donor.form:
                    found.append((-float(cosines[i, j]), place[head], place[donor]))
    pairs: list[tuple[Pair, float]] = []
    heads: set[int] = set()
    donors: set[int] = set()
    for cosine, head_, donor_ in sorted(found):
        if len(pairs) == count:
            break
        if head_ not in heads and head_ not in donors and donor_ not in heads:
            heads.add(head_)
            donors.add(donor_)
            pairs.append(((groups[head_], groups[donor_]), -cosine))
    return pairs


def _directions(layer: Sequence[HeadGroup]) -> npt.NDArray[np.float32]:
    """[W_q W_k] of each head as one vector of length 1."""
    rows = []
    for group in layer:
        parts = [_tensor(p.weight).numpy()[:, p.start : p.stop] for p in (*group.q, *group.k)]
        row = np.concatenate([np.asarray(part, np.float32).ravel() for part in parts])
        rows.append(row / max(float(np.linalg.norm(row)), 1e-30))
    return np.stack(rows)


def _share(pairs: Sequence[tuple[Piece, Piece]], edit: Editor) -> None:
    """Put each weight of which a piece is lent or got together from its pieces, those that are lent stored once."""
    got: dict[_Key, Piece] = {(piece.node, piece.start): donor for piece, donor in pairs}
    cuts: dict[ir.Node, dict[int, Piece]] = {}
    for piece in (piece for pair in pairs for piece in pair):
        cuts.setdefault(piece.node, {})[piece.start] = piece
    bank: dict[_Key, ir.Value] = {}
    tensors = {node: _tensor(node.inputs[1]) for node in cuts}
    for piece, donor in pairs:
        if piece.bias is not None and donor.bias is not None:
            _copy_bias(piece, donor, edit)

    def stored(node: ir.Node, start: int, stop: int) -> ir.Value:
        whole = tensors[node]
        if (start, stop) == (0, whole.shape.numpy()[1]):
            value = node.inputs[1]
            assert value is not None
            return value
        return edit.constant(columns(whole, start, stop), f"columns_{start}")

    parts: dict[ir.Node, list[ir.Value]] = {}
    for node, pieces in cuts.items():
        edit.at(node)
        width = int(tensors[node].shape.numpy()[1])
        parts[node], end = [], 0
        for start in sorted(pieces):
            if start > end:
                parts[node].append(stored(node, end, start))
            source = got.get((node, start), pieces[start])
            key = (source.node, source.start)
            if key not in bank:
                bank[key] = stored(source.node, source.start, source.stop)
            parts[node].append(bank[key])
            end = pieces[start].stop
        if end < width:
            parts[node].append(stored(node, end, width))
    for node, values in parts.items():
        edit.at(node)
        old = node.inputs[1]
        joined = values[0] if len(values) == 1 else edit.op("Concat", values, {"axis": 1}, like=old)
        if joined is not old:
            edit.set_input(node, 1, joined)


def _copy_bias(piece: Piece, donor: Piece, edit: Editor) -> None:
    """Give a piece the numbers that are added to its donor's."""
    assert piece.bias is not None
    assert donor.bias is not None
    node, index = piece.bias.node, piece.bias.index
    own, other = constant_array(node.inputs[index]), constant_array(donor.bias.node.inputs[donor.bias.index])
    assert own is not None
    assert other is not None
    array = own.copy()
    array[piece.start : piece.stop] = other[donor.start : donor.stop]
    edit.at(node)
    edit.set_input(node, index, edit.constant(array, "bias"))


def _tensor(value: ir.Value | None) -> ir.TensorProtocol:
    tensor = constant_tensor(value)
    assert tensor is not None
    return tensor
