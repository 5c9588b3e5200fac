"""Feeds of a language model for rows of tokens: which of its inputs gets what."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.data import Feeds, checked
from graphopt.errors import InputDataError, ModelError
from graphopt.graph.input_roles import InputRoles
from graphopt.graph.kv_interface import CachePair, kv_interface


@dataclasses.dataclass(frozen=True)
class TokenInputs:
    """The inputs of a language model by what they are; names, or None where there is no such one.

    Attributes:
        model: The model.
        token_ids: What gathers from the embedding.
        attention_mask: 1 for tokens that count.
        position_ids: Positions.
        token_types: Which of two texts a token belongs to.
        use_cache: A flag that chooses a branch with a past.
        pairs: The cache of a decoder.
        decoder: Whether it has a cache.
    """

    model: ir.Model
    token_ids: str
    attention_mask: str | None
    position_ids: str | None
    token_types: str | None
    use_cache: str | None
    pairs: tuple[CachePair, ...]
    decoder: bool

    @classmethod
    def read(cls, model: ir.Model) -> TokenInputs:
        """Read them off the graph.

        Raises:
            InputDataError: The model doesn't take tokens, or takes something besides.
        """
        cache = kv_interface(model)
        if cache is not None:
            ids, mask, positions = cache.token_ids, cache.attention_mask, cache.position_ids
            flag, pairs, others = cache.use_cache, cache.pairs, [*cache.others, *(pair.past for pair in cache.cross)]
            types = None
        else:
            own = [value for value in model.graph.inputs if not value.is_initializer()]
            types = next((v.name for v in own if _means_type(v)), None)
            roles = InputRoles.read([value for value in own if value.name != types])
            ids, mask, positions, flag = roles.token_ids, roles.attention_mask, roles.position_ids, roles.use_cache
            pairs, others = (), list(roles.others)
        if ids is None:
            raise InputDataError(
                "Text can't be calibration data of this model, none of whose inputs takes token ids; give an .npz file."
            )
        if others:
            raise InputDataError(
                f"Text alone doesn't tell what the input {others[0]!r} takes; give an .npz file with an array for each "
                "input."
            )
        return cls(model, ids, mask, positions, types, flag, pairs, cache is not None)

    def feeds(self, ids: npt.NDArray[Any], valid: npt.NDArray[np.bool_] | None = None) -> Feeds:
        """The feeds for rows of tokens, with an empty cache.

        Args:
            ids: [batch, tokens].
            valid: Which of them count, [batch, tokens]; None: all.

        Raises:
            InputDataError: They don't fit: a fixed number of tokens, or a cache whose sizes can't be told.
        """
        batch, _ = ids.shape
        valid = np.ones(ids.shape, dtype=np.bool_) if valid is None else valid
        given: dict[str | None, npt.NDArray[Any]] = {
            self.token_ids: ids,
            self.attention_mask: valid,
            self.position_ids: np.maximum(np.cumsum(valid, axis=1) - 1, 0),
            self.token_types: np.zeros(ids.shape, dtype=np.int64),
            self.use_cache: np.ones(1, dtype=np.bool_),
        }
        dtypes = {value.name: value.dtype for value in self.model.graph.inputs}
        made: Feeds = {}
        for name, array in given.items():
            if name is not None:
                dtype = dtypes[name]
                made[name] = array.astype(array.dtype if dtype is None else dtype.numpy())
        try:
            for pair in self.pairs:
                dtype = dtypes[pair.past] or ir.DataType.FLOAT
                made[pair.past] = np.zeros(pair.sizes_at(0, batch), dtype=dtype.numpy())
        except ModelError as error:
            raise InputDataError(f"Text can't be fed to this decoder: {error}") from error
        return checked(made, self.model, "the text")


@dataclasses.dataclass(frozen=True)
class TokenAxes:
    """Where the tokens of a batch are told: the names of the inputs, or None.

    Attributes:
        token_ids: [batch, tokens].
        attention_mask: [batch, past and new tokens], 0 for padding.
    """

    token_ids: str | None
    attention_mask: str | None

    @classmethod
    def read(cls, model: ir.Model) -> TokenAxes:
        """Read them off the graph; a model without tokens has none."""
        cache = kv_interface(model)
        if cache is not None:
            return cls(cache.token_ids, cache.attention_mask if cache.mask_values else None)
        own = [value for value in model.graph.inputs if not value.is_initializer() and not _means_type(value)]
        roles = InputRoles.read(own)
        if roles.token_ids is None:
            return cls(None, None)
        return cls(roles.token_ids, roles.attention_mask if roles.mask_values else None)

    def valid(self, feeds: Feeds) -> npt.NDArray[np.bool_] | None:
        """Which new tokens count, [batch, tokens]; None where all do, or there are no tokens."""
        if self.token_ids not in feeds or self.attention_mask not in feeds:
            return None
        mask, ids = feeds[self.attention_mask], feeds[self.token_ids]
        if mask.ndim != 2 or ids.ndim != 2 or mask.shape[0] != ids.shape[0] or mask.shape[1] < ids.shape[1]:
            return None
        valid = mask[:, mask.shape[1] - ids.shape[1] :] != 0
        return None if valid.all() else valid

    def sizes(self, feeds: Feeds) -> tuple[int, int]:
        """Rows and tokens of a batch; zeros where there are no tokens."""
        ids = feeds.get(self.token_ids or "")
        return (0, 0) if ids is None or ids.ndim != 2 else (ids.shape[0], ids.shape[1])


def _means_type(value: ir.Value) -> bool:
    whole = value.dtype is not None and value.dtype.is_integer()
    return whole and re.search("type|segment", value.name or "", re.IGNORECASE) is not None
