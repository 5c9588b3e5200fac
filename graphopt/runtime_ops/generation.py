"""Text generation with a decoder on ONNX Runtime: greedy or sampled, in batches, with its KV cache kept in place.

    generator = graphopt.Generator("folder")
    tokens = generator.generate([prompt_ids], max_new_tokens=64)

The inputs and outputs are read off the graph (`graphopt.graph.kv_interface`), so any exporter's names will do.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from graphopt.errors import InputDataError, ModelError, UsageError
from graphopt.graph.importance import read_importance
from graphopt.graph.kv_interface import KVInterface, kv_interface
from graphopt.graph.load import load
from graphopt.runtime_ops.decoding import Cache, Decoding
from graphopt.runtime_ops.eviction import Eviction, Evictor
from graphopt.runtime_ops.folder import model_file, stop_tokens
from graphopt.runtime_ops.sampling import Sampling
from graphopt.runtime_ops.session import session as make_session

if TYPE_CHECKING:
    import onnxruntime

Padding = Literal["left", "right"]

CHUNK = 512
"""Prompt tokens of one run: the logits of a whole long prompt would take more memory than the model."""
_ROW_BY_ROW = ("GroupQueryAttention", "SparseAttention")
"""Operators that take several new tokens after a past for one row only."""
_COUNTING = (*_ROW_BY_ROW, "CachedAttention", "QuantizedKVAttention")
"""Operators to which the mask is but a number of tokens from the start of the cache."""


class Generator:
    """A decoder that generates text.

    Args:
        model: The .onnx file, the folder of an exported model, or a session (then with `interface`).
        cache: "growing": each run gives out a new, longer cache. "static": past and present share one buffer, which
            needs an attention that writes in place (GroupQueryAttention) in every layer. "auto": static where it can
            be.
        threads: Threads within an operator; 0: all cores.
        sess_options: Options of your own for the session; then `threads` doesn't count.
        interface: Inputs and outputs; None: read off the file.
        extra: Further inputs of the model by name, the same in every run.

    Attributes:
        session: The session.
        interface: Inputs and outputs of the decoder.
        cache: "growing" or "static".
        stop: The tokens that end a text, as generation_config.json beside the model says; empty where there is none.

    Raises:
        ModelError: Not a decoder with a KV cache, or not one that can be run like this; the message says why.
        UsageError: A static cache isn't possible, or an argument is missing.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | onnxruntime.InferenceSession,
        *,
        cache: Cache | Literal["auto"] = "auto",
        threads: int = 0,
        sess_options: onnxruntime.SessionOptions | None = None,
        interface: KVInterface | None = None,
        extra: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        path = os.fspath(model_file(Path(model))) if isinstance(model, str | os.PathLike) else None
        if interface is None and path is None:
            raise UsageError("A session needs its interface: kv_interface(load(path)) of graphopt.graph.")
        self.name = path or "the model"
        self.stop = () if path is None else stop_tokens(Path(path))
        found = interface if interface is not None or path is None else kv_interface(load(path))
        self.extra = dict(extra or {})
        self.interface = _require_decoder(self.name, found, self.extra)
        possible = self.interface.shared_buffer
        if cache == "static" and not possible:
            raise UsageError(
                f"{self.name} can't have a static cache: past and present share a buffer only where every layer has "
                "a GroupQueryAttention that alone reads its past, and here they are joined by "
                f"{_joined(self.interface)}."
            )
        self.cache: Cache = "static" if possible and cache != "growing" else "growing"
        session: Any = _session(path, threads, sess_options) if path is not None else model
        self.session: onnxruntime.InferenceSession = session
        counting = [pair.operator in _COUNTING for pair in self.interface.pairs]
        self._counting, self._mixed = any(counting), any(counting) and not all(counting)
        self._row_by_row = any(
            operator in _ROW_BY_ROW for pair in self.interface.pairs for operator in (pair.operator, *pair.readers)
        )
        self._compact = all(counting) and self.interface.mask_values
        self._own_lengths = read_importance(session.get_modelmeta().custom_metadata_map) is not None

    # ---- what users call

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Collection[int] | None = None,
        padding: Padding | None = None,
        chunk: int = CHUNK,
        eviction: Eviction | None = None,
    ) -> list[list[int]]:
        """The new tokens of each prompt, up to the first stop token, which is the last one then.

        Args:
            prompts: Token ids, a row each.
            max_new_tokens: The most tokens that are made.
            sampling: How tokens are chosen; None: the most probable.
            stop: Tokens that end a row; None: those of the attribute `stop`.
            padding: The side on which shorter prompts are filled up; None: the one that the model knows.
            chunk: Prompt tokens of one run, at most.
            eviction: Which tokens the cache keeps; None: all.

        Raises:
            InputDataError: The prompts don't fit the model: empty, or of different lengths where it can't tell padding
                from text.
            UsageError: Tokens are to be dropped by a model that isn't made for it.
        """
        rows: list[list[int]] = [[] for _ in prompts]
        steps = self.stream(
            prompts, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop, padding=padding, chunk=chunk,
            eviction=eviction,
        )  # fmt: skip
        for step in steps:
            for row, token in zip(rows, step, strict=True):
                if token is not None:
                    row.append(token)
        return rows

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        stop: Collection[int] | None = None,
        padding: Padding | None = None,
        chunk: int = CHUNK,
        eviction: Eviction | None = None,
    ) -> Iterator[list[int | None]]:
        """As `generate`, token by token: at each step one for every row, None for rows that have ended."""
        if max_new_tokens < 1:
            raise UsageError(f"At least one new token must be asked for, not {max_new_tokens}.")
        choose = (sampling or Sampling()).chooser()
        ids, valid = self._padded(prompts, padding)
        decoding = self.start(len(ids), ids.shape[1] + max_new_tokens)
        evictor = None if eviction is None else Evictor(decoding, eviction, self.name)
        step = decoding.feed if evictor is None else evictor.step
        logits = self.prefill(decoding, ids, valid, chunk, evictor)
        running = np.ones(len(ids), dtype=np.bool_)
        for count in range(1, max_new_tokens + 1):
            tokens = choose(logits)
            yield [int(token) if on else None for token, on in zip(tokens, running, strict=True)]
            running &= ~np.isin(tokens, list(self.stop if stop is None else stop))
            if count == max_new_tokens or not running.any():
                return
            logits = step(tokens[:, None])[:, -1]

    # ---- its parts, for whoever measures or scores

    def start(self, batch: int, capacity: int) -> Decoding:
        """An empty cache for `batch` rows of at most `capacity` tokens."""
        return Decoding(
            self.session, self.interface, batch, cache=self.cache, capacity=capacity, compact=self._compact,
            extra=self.extra,
        )  # fmt: skip

    def prefill(
        self,
        decoding: Decoding,
        ids: npt.NDArray[np.int64],
        valid: npt.NDArray[np.bool_] | None = None,
        chunk: int = CHUNK,
        evictor: Evictor | None = None,
    ) -> npt.NDArray[Any]:
        """Feed a prompt, piece by piece, and return the logits after the last token of each row [batch, vocabulary].

        With an `evictor` (of `decoding`) it drops tokens behind it; the last piece has as many tokens then as the
        evictor looks at.
        """
        batch, tokens = ids.shape
        if chunk < 1:
            raise UsageError(f"A chunk must hold at least one token, not {chunk}.")
        valid = np.ones(ids.shape, dtype=np.bool_) if valid is None else valid
        # What only counts tokens takes a row that ends for one that hasn't begun, once there is a past.
        if batch > 1 and (self._row_by_row or (self._counting and not valid.all())):
            chunk = tokens
        last = tokens - 1 - np.argmax(valid[:, ::-1], axis=1)
        result: npt.NDArray[Any] | None = None
        begins = list(range(0, tokens, chunk))
        if evictor is not None and len(begins) > 1 and tokens - begins[-1] < evictor.window:
            begins[-1] = max(tokens - evictor.window, 0)
            begins = sorted(begin for begin in begins[:-1] if begin < begins[-1]) + begins[-1:]
        for begin, end in itertools.pairwise((*begins, tokens)):
            feed = decoding.feed if evictor is None else evictor.feed if end < tokens else evictor.end_prompt
            logits = feed(ids[:, begin:end], valid[:, begin:end])
            if result is None:
                result = np.zeros((batch, logits.shape[-1]), dtype=logits.dtype)
            for row in np.flatnonzero((begin <= last) & (last < end)):
                if logits.shape[1] != end - begin and last[row] != end - 1:
                    advice = "give prompts of one length" if self._compact else "pad on the left"
                    raise InputDataError(f"{self.name} gives logits for the last token only; {advice}.")
                result[row] = logits[row, last[row] - begin if logits.shape[1] == end - begin else -1]
        assert result is not None
        return result

    def _padded(
        self, prompts: Sequence[Sequence[int]], padding: Padding | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The prompts as one array, and which of its tokens count."""
        lengths = [len(prompt) for prompt in prompts]
        if not lengths or not all(lengths):
            raise InputDataError("There must be at least one prompt, and none may be empty.")
        if padding not in (None, "left", "right"):
            raise UsageError(f"Padding is on the left or on the right, not {padding!r}.")
        side = padding or ("right" if self._compact else "left")
        if len(set(lengths)) > 1:
            self._require_padding(side, padding is not None)
        width = max(lengths)
        ids = np.zeros((len(lengths), width), dtype=np.int64)
        valid = np.zeros(ids.shape, dtype=np.bool_)
        for row, prompt in enumerate(prompts):
            place = slice(width - len(prompt), width) if side == "left" else slice(0, len(prompt))
            ids[row, place], valid[row, place] = prompt, True
        return ids, valid

    def _require_padding(self, side: Padding, asked: bool) -> None:
        """Refuse prompts of different lengths where the model would take padding for text, or count it.

        Raises:
            InputDataError: It would.
        """
        which, advice = f"{self.name} can't take prompts of different lengths", "give prompts of one length"
        interface = self.interface
        if interface.attention_mask is None:
            raise InputDataError(f"{which}, because it has no attention mask; {advice}.")
        if self._own_lengths:
            raise InputDataError(
                f"{which}, because its layers count the tokens of caches of their own (evictable-kv); {advice}."
            )
        if not interface.mask_values:
            raise InputDataError(f"{which}, because it takes nothing but a length from its attention mask; {advice}.")
        if self._mixed:
            raise InputDataError(f"{which}, because its layers know padding on different sides; {advice}.")
        if self._compact and side == "left":
            raise InputDataError(
                f"{self.name} can't take padding on the left: GroupQueryAttention only counts the tokens of a row; "
                "pad on the right."
            )
        counted = interface.position_ids is not None or interface.positions_from_mask or self._compact
        if not counted and (side == "right" or not asked):
            raise InputDataError(
                f"{which}, because it counts positions by places in the cache, so padding moves them; {advice}, or ask "
                "for padding on the left if only the distances of tokens matter to it (a rotary embedding)."
            )


def _session(path: str, threads: int, sess_options: onnxruntime.SessionOptions | None) -> onnxruntime.InferenceSession:
    if sess_options is None:
        import onnxruntime

        sess_options = onnxruntime.SessionOptions()
        sess_options.intra_op_num_threads = threads
        sess_options.log_severity_level = 4  # what fails is raised, and told once
    return make_session(path, sess_options)


def _joined(interface: KVInterface) -> str:
    return ", ".join(sorted({pair.operator for pair in interface.pairs}))


def _require_decoder(name: str, interface: KVInterface | None, extra: Mapping[str, Any]) -> KVInterface:
    """The interface, of a model that can be generated with.

    Raises:
        ModelError: It can't.
    """
    if interface is None:
        raise ModelError(
            f"{name} is no decoder with a KV cache: no attention joins an input of it to new keys or values."
        )
    if interface.encoder_decoder:
        raise ModelError(
            f"{name} attends to another sequence (an encoder's), which the generator doesn't know how to make; run it "
            "with a pipeline that does."
        )
    problems = list(interface.problems)
    if interface.token_ids is None:
        problems.append("no input of whole numbers gathers from an embedding, as token ids do")
    if interface.logits is None:
        problems.append("no output is recognised as the logits")
    if missing := [other for other in interface.others if other not in extra]:
        problems.append(f"the inputs {', '.join(missing)} are unknown (give them as `extra`)")
    if problems:
        raise ModelError(f"{name} can't be generated with: {'; '.join(problems)}.")
    for pair in interface.pairs:
        pair.sizes_at(0)
    return interface
