"""The numbers of non-uniform types of few bits, each a codebook in ascending order; scales of groups stretch them."""

from __future__ import annotations

import statistics

Codebook = tuple[float, ...]

_SPECIAL = {3: (3.0, -3.0, 6.0), 4: (5.0, -5.0, 8.0)}
"""Of BitMoD, by bits. The negative one of the last isn't listed: the sign of a group's scale makes it of the other."""
_LARGEST = {(4, 3): 448.0, (5, 2): 57344.0}
"""Of the two types of 8 bits whose upper codes stand for infinity or no number, by bits of exponent and fraction."""


def normal_float(bits: int) -> Codebook:
    """NF4 and its kin: numbers of -1 to 1 that normal weights, divided by their largest magnitude, hit equally often.

    Quantiles of the normal distribution at equal steps of probability, from the middle to 1 - δ above 0 and from δ to
    the middle below, with one more above than below, and 0 itself. δ = (1 / 2^(bits+1) + 1 / (2^(bits+1) - 2)) / 2 is
    the mean of half a step's probability on either side. Paper: "QLoRA: Efficient Finetuning of Quantized LLMs".

    Args:
        bits: 2 to 8.

    Returns:
        2^bits numbers, the first -1, the last 1.

    Raises:
        ValueError: Bits out of range.
    """
    _check("NormalFloat", bits, 2, 8)
    above = 1 << (bits - 1)
    outermost = 1 - (1 / (1 << (bits + 1)) + 1 / ((1 << (bits + 1)) - 2)) / 2
    quantile = statistics.NormalDist().inv_cdf

    def side(count: int) -> list[float]:
        return [quantile(outermost + (0.5 - outermost) * (count - step) / count) for step in range(1, count + 1)]

    largest = quantile(outermost)
    numbers = [*(-number for number in reversed(side(above - 1))), 0.0, *side(above)]
    return tuple(number / largest for number in numbers)


def minifloat(exponent: int, fraction: int) -> Codebook:
    """ExMy: a sign, x bits of exponent with the usual bias, y bits of fraction, denormal numbers next to 0.

    As in the formats of the Open Compute Project ("OCP Microscaling Formats"), all codes are finite numbers, but for
    those of E4M3 and E5M2 (8 bits), of which some stand for infinity or for none. What is left of the 2^bits codes, one
    being a second zero, is left out here.

    Args:
        exponent: x, at least 1. E1My has even steps.
        fraction: y, at least 0.

    Raises:
        ValueError: The type has more than 8 bits, or no exponent.
    """
    if exponent < 1 or fraction < 0 or exponent + fraction > 7:
        raise ValueError(
            f"E{exponent}M{fraction} isn't a type here: ExMy has an exponent of 1 bit or more, and 2 to 8 bits in all"
        )
    bias = (1 << (exponent - 1)) - 1
    steps = 1 << fraction
    sizes = [mantissa / steps * 2.0 ** (1 - bias) for mantissa in range(steps)]
    sizes += [
        (1 + mantissa / steps) * 2.0 ** (power - bias) for power in range(1, 1 << exponent) for mantissa in range(steps)
    ]
    sizes = [size for size in sizes if size <= _LARGEST.get((exponent, fraction), size)]
    return tuple([-size for size in sizes[:0:-1]] + sizes)


def power(bits: int, exponent: float) -> Codebook:
    """NUPES: integers q of the width brought back through an automorphism of the products, sign(q) |q|^(1/a).

    With a = 1 the numbers are integers; below 1 they lie closer together near 0, where most weights are. As in the
    uniform grid, q goes from -2^(bits-1) to 2^(bits-1) - 1. Paper: "NUPES: Non-Uniform Post-Training Quantization via
    Power Exponent Search".

    Args:
        bits: 2 to 8.
        exponent: a, above 0 and at most 1.

    Raises:
        ValueError: Out of range.
    """
    _check("a power grid", bits, 2, 8)
    if not 0 < exponent <= 1:
        raise ValueError(f"the exponent of a power grid is above 0 and at most 1, not {exponent}")
    middle = 1 << (bits - 1)
    return tuple((abs(q) ** (1 / exponent)) * (1 if q >= 0 else -1) for q in range(-middle, middle))


def bitmod(bits: int) -> tuple[Codebook, ...]:
    """BitMoD: small floats whose code of the second zero stands for one special value more; each group chooses which.

    3 bits: 0, ±1, ±2, ±4 and one of 3, -3, 6, -6. 4 bits: those of E2M1 and one of 5, -5, 8, -8. Paper: "BitMoD:
    Bit-serial Mixture-of-Datatype LLM Acceleration".

    Args:
        bits: 3 or 4.

    Returns:
        Three codebooks: the fourth type is the third with a negative scale.

    Raises:
        ValueError: Other bits.
    """
    _check("BitMoD", bits, 3, 4)
    basic = minifloat(2, 1) if bits == 4 else (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
    return tuple(tuple(sorted((*basic, special))) for special in _SPECIAL[bits])


def _check(what: str, bits: int, least: int, most: int) -> None:
    if not least <= bits <= most:
        raise ValueError(f"{what} has {least} to {most} bits here, not {bits}")
