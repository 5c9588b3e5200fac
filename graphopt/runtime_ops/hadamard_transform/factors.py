"""Factors of HadamardTransform for sizes that are no power of two: Hadamard matrices where they can be made."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

LARGEST = 256
"""A Hadamard matrix of more rows is dearer than what it is better in than a random rotation of fewer."""


def hadamard_factor(features: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """A factor for groups of so many features.

    The smallest Hadamard matrix of m rows (entries 1 and -1, rows orthogonal) with features = 2^k · m that
    `hadamard_matrix` makes, of at most `LARGEST` rows; else a random rotation, scaled as one, whose m is the odd part of
    `features`.

    Args:
        features: At least 1.
        seed: Of the random rotation.

    Returns:
        F [m, m] with F · Fᵀ = m; with `scale` = features^-0.5 the transform is orthogonal.
    """
    odd = features
    while odd % 2 == 0:
        odd //= 2
    rows = odd
    while features % rows == 0 and rows <= LARGEST:
        found = hadamard_matrix(rows)
        if found is not None:
            return found
        rows *= 2
    rotation, upper = np.linalg.qr(np.random.default_rng(seed).standard_normal((odd, odd)))
    # The signs make every rotation as likely as every other.
    return np.asarray(rotation * np.sign(np.diag(upper)) * odd**0.5, np.float32)


def hadamard_matrix(rows: int) -> npt.NDArray[np.float32] | None:
    """A Hadamard matrix by Sylvester's and Paley's constructions ("On Orthogonal Matrices"); None: they make none.

    Returns:
        [rows, rows] of 1 and -1, with orthogonal rows.
    """
    if rows == 1:
        return np.ones((1, 1), np.float32)
    if rows == 2:
        return np.array([[1, 1], [1, -1]], np.float32)
    if rows % 4 or rows < 4:
        return None
    if (paley := _first(rows - 1)) is not None:
        return paley
    if (paley := _second(rows // 2 - 1)) is not None:
        return paley
    half = hadamard_matrix(rows // 2)
    return None if half is None else np.kron(np.array([[1, 1], [1, -1]], np.float32), half)


def _first(order: int) -> npt.NDArray[np.float32] | None:
    """Of order + 1 rows, where the field of `order` elements has no root of -1."""
    if order % 4 != 3 or (character := _residues(order)) is None:
        return None
    made = np.ones((order + 1, order + 1), np.float32)
    made[1:, 0] = -1
    made[1:, 1:] = character + np.eye(order)
    return made


def _second(order: int) -> npt.NDArray[np.float32] | None:
    """Of 2 · (order + 1) rows, where the field of `order` elements has a root of -1."""
    if order % 4 != 1 or order < 5 or (character := _residues(order)) is None:
        return None
    conference = np.ones((order + 1, order + 1), np.float32)
    conference[0, 0] = 0
    conference[1:, 1:] = character
    made = np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(order + 1), [[1, -1], [-1, -1]])
    return np.asarray(made, np.float32)


def _residues(order: int) -> npt.NDArray[np.float32] | None:
    """[order, order]: 1 where the difference of two elements of the finite field is a square, 0 at 0, else -1.

    None: `order` is no power of a prime, so that there is no such field.
    """
    prime = next(p for p in range(2, order + 1) if order % p == 0)
    degree = round(np.log(order) / np.log(prime))
    if prime**degree != order:
        return None
    places = prime ** np.arange(degree)
    digits = np.arange(order)[:, None] // places % prime
    character = np.full(order, -1, np.float32)
    character[[0, *_squares(prime, degree)]] = 1
    character[0] = 0
    return np.asarray(character[((digits[:, None] - digits[None, :]) % prime) @ places])


def _squares(prime: int, degree: int) -> list[int]:
    """The squares but 0 of the field of prime^degree elements, each the number whose digits are its coefficients."""
    for feedback in itertools.product(range(prime), repeat=degree):
        # Powers of x modulo x^degree - feedback. Where they are all elements but 0, every other one is a square.
        one = element = (1, *[0] * (degree - 1))
        powers: list[int] = []
        while len(powers) < prime**degree and (not powers or element != one):
            powers.append(sum(digit * prime**place for place, digit in enumerate(element)))
            last = element[-1]
            element = tuple((s + last * f) % prime for s, f in zip((0, *element[:-1]), feedback, strict=True))
        if len(powers) == prime**degree - 1:
            return powers[::2]
    raise AssertionError("every finite field has a primitive element")
