"""The errors a user can meet. Each message is one sentence that names the place and the remedy."""

from __future__ import annotations


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


class VerificationError(GraphoptError):
    """Two models that should be equal are not, or one of them doesn't run."""

    exit_code = 5
