"""low-rank-kv: the cache holds features of lower rank, from which keys and values are rebuilt."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import onnx_ir as ir

from graphopt.analysis.shapes import ShapeFacts
from graphopt.passes.kv.cache_codes import Plain
from graphopt.passes.kv.cache_moments import gathered
from graphopt.passes.kv.cache_rows import Samples
from graphopt.passes.kv.coded_kv import CodedKV, read_by
from graphopt.passes.kv.coded_writer import Coding, Member
from graphopt.passes.kv.feature_bases import Spectrum, spectrum
from graphopt.search.allocation import Choice, Item, allocate

_STEPS = 16
"""Ranks that an allocation chooses from are multiples of a part of all so large."""


class LowRankKV(CodedKV):
    """Cache features of lower rank in place of keys and values, which are rebuilt from them where they are read.

        c = (k − μ) E,   k̂ = c D + μ,   E [d, r],  D [r, d]

    with the keys k [d] of one token, all KV heads side by side, before their rotation; values likewise. The projection
    of keys and the encoder E are one product, W_k E, so that a layer computes r numbers a token for the cache
    [batch, 1, tokens, r], and biases stay exact. Keys of past and new tokens are rebuilt at each step, a product for
    each head, and turned by their positions, counted from 0.

    Papers: CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios (Wang et al., 2024); xKV:
    Cross-Layer SVD for KV-Cache Compression (Chang et al., 2025).

    1. E and D lose least, in the mean over the data, of (k − k̂) M (k − k̂)ᵀ among all maps of rank r. With M = L Lᵀ
       they are L U and Uᵀ L⁻¹, U the first r principal axes of (k − μ) L. Keys: M holds for each KV head the second
       moment of the queries that ask it, turned by the distances of a sample, so that the errors of the scores count;
       half of what a key counts is the attention that it receives. Values: M is what the output projection makes of the
       head, Σ W_o W_oᵀ over the query heads that read it, and the rows are values as each head averages them. Without
       `weighted` M is the identity and tokens count alike, as in both papers.
    2. `layers: 2` or more (xKV): so many neighbouring layers have one cache of their keys side by side, and one of
       their values, of as many times the rank. Features of a token are there when its last layer is done, so that the
       tokens of a run see each other's own keys and values, and only those of earlier runs are rebuilt. `exact` makes
       that so for single layers too. The quality of one long prompt says nothing about it, then: judge what is
       generated token by token.
    3. `window` (CSKV's second branch): the last so many tokens before a run keep their exact keys and values, in a
       cache [batch, heads, min(past, window), D] of each layer beside the features of all tokens; new tokens of a run
       are exact as in rule 2. Only older tokens are rebuilt. That cache doesn't grow: a window of w tokens takes the
       bytes that w tokens take in the original.
    4. Ranks: a part of the channels (`keys`, `values`); a number of them for each layer (`key_rank`, `value_rank`); as
       many as keep a part of the energy that rule 1 counts (`energy`); or allocated over layers, keys and values so
       that the whole cache has a part of its size (`fraction`) and the sum of the lost parts of energy is least.

    **Options:** `keys` (default 0.5): part of the channels of keys that stay, up to 1; `values` (default 0.75): the
    same of values; `key_rank` (default: by `keys`): channels of keys for each layer; `value_rank` (default: by
    `values`): the same of values; `energy` (default: none): part of the energy that is kept, in place of these;
    `fraction` (default: none): part of the whole cache, in place of these; `layers` (default 1): layers with one cache,
    rule 2; `exact` (default false): rule 2; `window` (default 0): tokens, rule 3; `weighted` (default true): rule 1;
    `samples` (default 8): of the data; `keep` (default none): layers that stay as they are, counted from 0 among those
    with a cache.

    **Needs:** `Attention` with a cache, as `raise-attention` makes it; data; for keys that are rotated the assumption
    counted-positions, and max-length where the table of rotations is to be a constant.
    **Guarantees:** LOSSY; exact where keys and values have the rank that stays.

    **Left alone, with the reason:** a cache that isn't joined by `Attention`, or that isn't an input and an output of
    the model as it is; rotations of positions that aren't known; a cache of which the sizes are read; float64.

    `group-query-attention` and `quantize-kv` leave such a layer alone, since they know no other cache than one of keys
    and values; `Attention` runs it.

    **When not to use it:** for batches of prompts of different lengths, where keys are rotated: a row's positions have
    to be its places in the cache. Where time counts, not memory: rebuilding takes r · d products for each token of the
    past at each step. Where quantize-kv will do, which costs less for the same bytes (docs/kv.md has both).
    """

    name: ClassVar[str] = "low-rank-kv"
    paper: ClassVar[str] = "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios"

    def __init__(
        self,
        keys: float = 0.5,
        values: float = 0.75,
        key_rank: int | None = None,
        value_rank: int | None = None,
        energy: float | None = None,
        fraction: float | None = None,
        layers: int = 1,
        exact: bool = False,
        window: int = 0,
        weighted: bool = True,
        samples: int = 8,
        keep: list[int] | None = None,
    ) -> None:
        super().__init__(samples, keep)
        for name, part in (("keys", keys), ("values", values), ("energy", energy), ("fraction", fraction)):
            if part is not None and not 0 < part <= 1:
                raise ValueError(f"{name} is a part, above 0 and up to 1, not {part}")
        for name, rank in (("key_rank", key_rank), ("value_rank", value_rank)):
            if rank is not None and rank < 1:
                raise ValueError(f"{name} must be at least 1, not {rank}")
        ranks = key_rank is not None or value_rank is not None
        if (energy is not None) + (fraction is not None) + ranks > 1:
            raise ValueError("ranks come from energy, from fraction or from key_rank and value_rank, not from several")
        if layers < 1:
            raise ValueError(f"layers must be positive, not {layers}")
        if window < 0:
            raise ValueError(f"window can't be negative: {window}")
        self.keys, self.values, self.key_rank, self.value_rank = keys, values, key_rank, value_rank
        self.energy, self.fraction, self.layers, self.weighted = energy, fraction, layers, weighted
        self.exact, self.window = exact, window

    def grouped(self, members: Mapping[int, Member]) -> list[list[Member]]:
        """See the base: neighbours of one form together."""
        groups: list[list[Member]] = []
        for number, member in members.items():
            last = groups[-1] if groups else []
            fits = last and len(last) < self.layers and last[-1].layer.number == number - 1
            if fits and last[-1].layer.form == member.layer.form:
                last.append(member)
            else:
                groups.append([member])
        return groups

    def codings(
        self, model: ir.Model, groups: Sequence[Sequence[Member]], samples: Samples, facts: ShapeFacts
    ) -> list[tuple[Coding, Coding]]:
        """See the base."""
        spectra = self._spectra(model, groups, samples, facts)
        ranks = self._ranks(groups, spectra)
        found = []
        for members, (key, value), (key_rank, value_rank) in zip(groups, spectra, ranks, strict=True):
            self._tell(members, key, value, key_rank, value_rank)
            keys, values = key.basis(key_rank), value.basis(value_rank)
            found.append((Coding(keys, Plain(key_rank)), Coding(values, Plain(value_rank))))
        return found

    def together(self, members: Sequence[Member]) -> bool:
        """See the base."""
        return len(members) > 1 or self.exact or self.window > 0

    # ---- which bases

    def _spectra(
        self, model: ir.Model, groups: Sequence[Sequence[Member]], samples: Samples, facts: ShapeFacts
    ) -> list[tuple[Spectrum, Spectrum]]:
        """Of the keys and of the values of each group."""
        assert self.calibration is not None
        sites = [[member.site for member in group] for group in groups]
        found = []
        every = gathered(model, sites, samples, self.calibration.threads, attended=self.weighted)
        for group, moments in zip(groups, every, strict=True):
            self.require_finite(group, moments.keys, moments.values, moments.asked)
            asked = moments.asked if self.weighted else None
            weight = read_by(group, facts) if self.weighted else None
            found.append((spectrum(moments.keys, moments.key_mean, asked),
                          spectrum(moments.values, moments.value_mean, weight)))  # fmt: skip
        return found

    def _ranks(
        self, groups: Sequence[Sequence[Member]], spectra: Sequence[tuple[Spectrum, Spectrum]]
    ) -> list[tuple[int, int]]:
        """Channels of the keys and of the values of each group."""
        if self.fraction is not None:
            return self._allocated(spectra, self.fraction)
        found = []
        for group, (key, value) in zip(groups, spectra, strict=True):
            both = []
            for one, part, rank in ((key, self.keys, self.key_rank), (value, self.values, self.value_rank)):
                size = len(one.energies)
                if self.energy is not None:
                    both.append(one.rank_for(self.energy))
                else:
                    wanted = round(part * size) if rank is None else rank * len(group)
                    both.append(min(max(wanted, 1), size))
            found.append((both[0], both[1]))
        return found

    @staticmethod
    def _allocated(spectra: Sequence[tuple[Spectrum, Spectrum]], fraction: float) -> list[tuple[int, int]]:
        """The ranks whose lost parts of energy sum to least, with a part of all channels."""
        items = []
        for index, one in enumerate(itertools.chain.from_iterable(spectra)):
            size = len(one.energies)
            ranks = sorted({max(1, round(size * step / _STEPS)) for step in range(1, _STEPS + 1)})
            items.append(Item(f"{index}", tuple(Choice(f"{rank}", rank, one.lost(rank)) for rank in ranks)))
        total = sum(len(one.energies) for pair in spectra for one in pair)
        chosen = [int(choice.name) for choice in allocate(items, fraction * total).chosen]
        return list(zip(chosen[::2], chosen[1::2], strict=True))

    def _tell(self, members: Sequence[Member], key: Spectrum, value: Spectrum, key_rank: int, value_rank: int) -> None:
        told = ", ".join(
            f"{name} {rank} of {len(one.energies)} channels, {one.lost(rank):.2%} lost"
            for name, one, rank in (("keys", key, key_rank), ("values", value, value_rank))
        )
        numbers = [member.layer.number for member in members]
        for member in members:
            shared = f"of layers {numbers[0]} to {numbers[-1]} together: " if len(members) > 1 else ""
            exact = f"; the last {self.window} tokens exact" if self.window else ""
            self.applied(member.layer.node, f"cached in features {shared}{told}{exact}")
