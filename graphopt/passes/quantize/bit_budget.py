"""What `allocate-bits` may spend: bits, bytes, time, or quality."""

from __future__ import annotations

import dataclasses
import re

_BYTES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2.0**10, "mib": 2.0**20, "gib": 2.0**30}
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_NUMBER = r"(\d+(?:\.\d+)?)"
_KNOWN = (
    "budget is bits per weight (4.25), bytes (80MB), a divergence (kl=0.1), the products' time at one token as a part "
    "of that of float ones (latency=0.5) or as it is (latency=12ms), or bits or bytes with a latency (80MB, "
    "latency=0.5), not "
)


@dataclasses.dataclass(frozen=True)
class Budget:
    """What all weights together may take; None: it isn't limited.

    Attributes:
        bits: For each weight, in the mean.
        bytes: Of the weights as they are stored.
        divergence: Of the outputs: the least bytes that keep below it.
        part: Of the time of the float products at one token.
        seconds: Of the products at one token.
    """

    bits: float | None = None
    bytes: float | None = None
    divergence: float | None = None
    part: float | None = None
    seconds: float | None = None

    @property
    def timed(self) -> bool:
        """Whether products have to be timed."""
        return self.part is not None or self.seconds is not None

    @property
    def sized(self) -> bool:
        """Whether bytes are limited."""
        return self.bits is not None or self.bytes is not None

    def most_bytes(self, numbers: int) -> float:
        """Bytes that so many weights may take."""
        assert self.sized
        return self.bytes if self.bytes is not None else (self.bits or 0.0) * numbers / 8

    def most_seconds(self, floats: float) -> float:
        """Seconds that products may take whose float ones take `floats`."""
        assert self.timed
        return self.seconds if self.seconds is not None else (self.part or 0.0) * floats


def parsed(budget: float | str) -> Budget:
    """A budget as it is given.

    Raises:
        ValueError: It isn't of a known form.
    """
    if isinstance(budget, int | float) and not isinstance(budget, bool) and 0 < budget < 32:
        return Budget(bits=float(budget))
    found: dict[str, float] = {}
    for part in str(budget).lower().split(","):
        one = _part("".join(part.split()))
        if one is None or one[0] in found:
            raise ValueError(f"{_KNOWN}{budget!r}")
        found[one[0]] = one[1]
    made = Budget(**found)
    if len(found) > 1 and not (len(found) == 2 and made.timed and made.sized):
        raise ValueError(f"{_KNOWN}{budget!r}")
    return made


def _part(word: str) -> tuple[str, float] | None:
    """The attribute that a part of a budget sets, and to what; None: it isn't known."""
    if match := re.fullmatch(_NUMBER + r"([kmg]i?b)", word):
        return "bytes", float(match[1]) * _BYTES[match[2]]
    if match := re.fullmatch("kl=" + _NUMBER, word):
        return "divergence", float(match[1])
    if (match := re.fullmatch(f"latency={_NUMBER}(us|ms|s)", word)) and float(match[1]) > 0:
        return "seconds", float(match[1]) * _SECONDS[match[2]]
    if (match := re.fullmatch(f"latency={_NUMBER}", word)) and 0 < float(match[1]) <= 1:
        return "part", float(match[1])
    if (match := re.fullmatch(_NUMBER, word)) and 0 < float(match[1]) < 32:
        return "bits", float(match[1])
    return None
