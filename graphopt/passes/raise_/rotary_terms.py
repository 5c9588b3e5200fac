"""Sums of signed products as arrays: the numbers behind `rotary_forms`.

A form is an integer array of the shape (terms, 4, *elements): each element of a vector is a sum of terms, each of which
is a sign in {-1, 0, 1}, an index in x, the number of a table, and an index in the table; -1 where there is no x or no
table.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Form = npt.NDArray[np.int64]

SIGN, X, TABLE, INDEX = range(4)
MAX_TERMS = 4
NONE = np.array([0, -1, -1, 0], dtype=np.int64)


def term(sign: npt.ArrayLike, x: npt.ArrayLike, table: npt.ArrayLike, index: npt.ArrayLike) -> Form:
    """A form of one term."""
    return np.stack(np.broadcast_arrays(sign, x, table, index)).astype(np.int64)[None]


def columns_of(columns: npt.NDArray[np.floating]) -> tuple[Form, Form]:
    """For every row the first that is equal to it or to its negative, and which of the two."""
    seen: dict[bytes, int] = {}
    signs, index = np.ones(len(columns), np.int64), np.arange(len(columns))
    for i, column in enumerate(columns):
        same, opposite = seen.get((column + 0).tobytes()), seen.get((0 - column).tobytes())  # without negative zeros
        if same is not None:
            index[i] = same
        elif opposite is not None:
            index[i], signs[i] = opposite, -1
        else:
            seen[(column + 0).tobytes()] = i
    return signs, index


def negated(form: Form) -> Form:
    """The form with every sign turned."""
    result = form.copy()
    result[:, SIGN] *= -1
    return result


def of_x(form: Form) -> bool:
    """Whether every term has x in it."""
    return bool(((form[:, X] >= 0) | (form[:, SIGN] == 0)).all())


def lengthened(form: Form, terms: int) -> Form:
    """The form with terms added that no element has."""
    nothing = np.broadcast_to(NONE.reshape((1, 4) + (1,) * (form.ndim - 2)), (terms - len(form), *form.shape[1:]))
    return np.concatenate([form, nothing])


def multiplied(a: Form, b: Form) -> Form | None:
    """The product of two forms, None where x, or two tables, would be multiplied with each other."""
    if len(a) * len(b) > MAX_TERMS:
        return None
    shape = broadcast(a.shape[2:], b.shape[2:])
    if shape is None:
        return None
    a = a.reshape(*a.shape[:2], *[1] * (len(shape) - (a.ndim - 2)), *a.shape[2:])
    b = b.reshape(*b.shape[:2], *[1] * (len(shape) - (b.ndim - 2)), *b.shape[2:])
    terms = []
    for one in a:
        for other in b:
            one, other = (np.broadcast_to(f, (4, *shape)) for f in (one, other))
            there = one[SIGN] * other[SIGN] != 0
            if (there & (((one[X] >= 0) & (other[X] >= 0)) | ((one[TABLE] >= 0) & (other[TABLE] >= 0)))).any():
                return None
            term = np.stack(
                [
                    one[SIGN] * other[SIGN],
                    np.maximum(one[X], other[X]),
                    np.maximum(one[TABLE], other[TABLE]),
                    np.where(one[TABLE] >= 0, one[INDEX], other[INDEX]),
                ]
            )
            term[:, ~there] = NONE[:, None]
            terms.append(term)
    return np.stack(terms)


def packed(form: Form) -> Form:
    """`form` with the terms that are there first and those that no element has left out."""
    order = np.argsort(form[:, SIGN] == 0, axis=0, kind="stable")
    form = np.take_along_axis(form, order[:, None], axis=0)
    used = (form[:, SIGN] != 0).reshape(len(form), -1).any(axis=1)
    return form[: max(int(used.sum()), 1)]


def broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    """The common shape, None where there is none."""
    try:
        return np.broadcast_shapes(a, b)
    except ValueError:
        return None


def fits(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether the shape `a` broadcasts to `b`."""
    return broadcast(a, b) == b
