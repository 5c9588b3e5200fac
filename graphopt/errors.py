"""The errors a user can meet. Each message is one sentence that names the place and the remedy."""

from __future__ import annotations

import re


class GraphoptError(Exception):
    """Base of every error that graphopt raises on purpose; the CLI prints it without a traceback."""

    exit_code = 1


class ModelError(GraphoptError):
    """The model file or graph is broken: truncated, cyclic, undefined inputs, missing data, ..."""

    exit_code = 3


class UsageError(GraphoptError):
    """The request is wrong: unknown pass, bad option, output over the input, ..."""

    exit_code = 2


class InputDataError(GraphoptError):
    """Data given by the user doesn't fit the model: names, shapes or dtypes of inputs."""

    exit_code = 4


class AssumptionError(GraphoptError):
    """Inputs lie outside of what an optimized model takes for granted; see `graphopt.graph.assumptions`."""

    exit_code = 4


class VerificationError(GraphoptError):
    """Two models that should be equal are not, or one of them doesn't run."""

    exit_code = 5


class QualityError(GraphoptError):
    """A model does its task worse than a floor allows."""

    exit_code = 7


class GraphoptWarning(UserWarning):
    """Something works, but not as well as it could; the CLI prints it as one sentence."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that says something, at most 300 characters.

    Of an exception raised from another it is the innermost one's, which says what went wrong.
    """
    while error.__cause__ is not None:
        error = error.__cause__
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:300].rstrip(".:;")
