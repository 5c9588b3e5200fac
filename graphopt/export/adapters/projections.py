"""Random matrices that all modules of an adapter share, made again where the adapter was saved without them.

They are torch's random numbers for the seed in the configuration, so torch makes them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from graphopt.export.adapters.checkpoint import Adapter
from graphopt.export.adapters.site import Array
from graphopt.export.dependencies import require


def shared_tensors(adapter: Adapter, sizes: Sequence[tuple[int, int]]) -> Callable[[str], Array]:
    """A function that gives what all modules of an adapter share, by name: stored, or made again when first asked for.

    Args:
        adapter: The adapter.
        sizes: Output and input features of every module that it changes.
    """
    made: dict[str, Array] = {}

    def shared(name: str) -> Array:
        if name not in adapter.common and not made:
            made.update(_regenerated(adapter, sizes))
        return made[name] if name in made else adapter.shared(name)

    return shared


def _regenerated(adapter: Adapter, sizes: Sequence[tuple[int, int]]) -> dict[str, Array]:
    """The shared matrices of a VeRA or RandLoRA adapter; empty for other methods."""
    kind = adapter.config["peft_type"]
    if kind not in ("VERA", "RANDLORA") or not sizes:
        return {}
    torch = require("torch")
    generator = torch.Generator(device="cpu").manual_seed(int(adapter.config["projection_prng_key"]))
    outputs, inputs = max(o for o, _ in sizes), max(i for _, i in sizes)
    rank = int(adapter.config["r"])
    if kind == "VERA":

        def kaiming(rows: int, columns: int) -> Array:
            bound = math.sqrt(3) * math.sqrt(2) / math.sqrt(columns)
            found: Array = torch.empty(rows, columns).uniform_(-bound, bound, generator=generator).numpy()
            return found

        return {"vera_A": kaiming(rank, inputs), "vera_B": kaiming(outputs, rank)}
    small, large = min(outputs, inputs), max(outputs, inputs)
    bases = -(-small // rank)
    if adapter.config.get("sparse") or adapter.config.get("very_sparse"):
        sparsity = math.sqrt(small) if adapter.config.get("very_sparse") else 3
        edge = 1 / (2 * sparsity)

        def signs(*shape: int) -> Array:
            drawn = torch.rand(shape, generator=generator)
            found = (drawn > 1 - edge).float() - (drawn < edge).float()
            made: Array = (found / found.std()).numpy()
            return made

        return {"randlora_A": signs(rank, 1, small), "randlora_B": signs(large, bases, rank)}

    def basis(*shape: int) -> Any:
        # peft draws them in bfloat16, and keeps them in it until they are normalised.
        empty = torch.empty(shape, dtype=torch.bfloat16)
        return torch.nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)

    a = basis(rank, 1, small)
    b = torch.cat([basis(large, 1, rank) for _ in range(bases)], dim=1)
    return {"randlora_A": (a / a.std()).float().numpy(), "randlora_B": (b / b.std()).float().numpy()}
