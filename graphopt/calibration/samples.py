"""The samples of a calibration on their way through a model: what is carried between pieces, and which tokens count."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphopt.calibration.carried import Carried
from graphopt.calibration.data import Dataset, Feeds
from graphopt.calibration.piece_model import RECEIVED, VALID
from graphopt.calibration.token_feeds import TokenAxes
from graphopt.errors import GraphoptError, InputDataError
from graphopt.graph.skeleton import first_line
from graphopt.runtime_ops.memory_session import WeightStore, make_session, run

if TYPE_CHECKING:
    import onnxruntime

Array = npt.NDArray[Any]


class Session:
    """A session of a piece, with the file of those weights that lie in memory only."""

    def __init__(self, model: ir.Model, threads: int | None) -> None:
        self.store = WeightStore()
        self.session: onnxruntime.InferenceSession = make_session(model, threads=threads, store=self.store)
        self.inputs = [item.name for item in self.session.get_inputs()]
        self.outputs = [item.name for item in self.session.get_outputs()]


class Samples:
    """All samples of a data set.

    Args:
        model: The model.
        data: The data set.
        budget_bytes: Activations kept in memory; what is more goes to a temporary file.
        threads: Threads within an operator; None leaves it to ONNX Runtime.

    Attributes:
        axes: Where the tokens of a batch are told.
        carried: The activations that are kept, by sample and name; at first the inputs.
        valid: For each sample the tokens that count [batch, tokens]; None: all.
        sizes: For each sample its rows and tokens.
        received: For each attention that was looked at, and each sample, what its tokens received [batch, tokens].
    """

    def __init__(self, model: ir.Model, data: Dataset, budget_bytes: int, threads: int | None) -> None:
        self._model, self._data, self._threads = model, data, threads
        self.axes = TokenAxes.read(model)
        self.carried = Carried(budget_bytes)
        self.valid: list[npt.NDArray[np.bool_] | None] = []
        self.sizes: list[tuple[int, int]] = []
        self.received: dict[ir.Node, dict[int, Array]] = {}
        self._shown = {f"{RECEIVED}{node.name}": node for node in model.graph}

    def __len__(self) -> int:
        """Number of samples, once they are taken."""
        return len(self.valid)

    def empty(self) -> set[str]:
        """The inputs that hold nothing, such as the cache of a decoder, as the first sample tells."""
        first = next(self._data.feeds(self._model), {})
        return {name for name, array in first.items() if array.size == 0}

    def start(self) -> None:
        """Take the samples, if that wasn't done.

        Raises:
            InputDataError: They don't fit the model, or there is none.
        """
        if self.valid:
            return
        defaults = {value.name for value in self._model.graph.inputs if value.is_initializer()}
        for sample, feeds in enumerate(self._data.feeds(self._model)):
            if given := defaults & set(feeds):
                raise InputDataError(
                    f"The input {next(iter(given))!r} has a default, which calibration uses; leave it out."
                )
            self.valid.append(self.axes.valid(feeds))
            self.sizes.append(self.axes.sizes(feeds))
            for name, array in feeds.items():
                self.carried.put(sample, name, array)
        if not self.valid:
            raise InputDataError("There is no sample in the calibration data.")

    def session(self, model: ir.Model) -> Session:
        """A session for a piece, whose inputs have the types of what is carried."""
        for value in model.graph.inputs:
            if value.name != VALID:
                array = self.carried.get(0, value.name or "")
                dtype = ir.DataType.STRING if array.dtype == object else ir.DataType.from_numpy(array.dtype)
                value.type = ir.TensorType(dtype)
                value.shape = ir.Shape([None] * array.ndim)
        return Session(model, self._threads)

    def run(self, session: Session, sample: int) -> dict[str, Array]:
        """The outputs of a piece for one sample; what attentions in it show is entered into `received`.

        Raises:
            InputDataError: It doesn't run.
        """
        feeds: Feeds = {
            name: self._share(sample) if name == VALID else self.carried.get(sample, name) for name in session.inputs
        }
        try:
            arrays = run(session.session, feeds)
        except GraphoptError:
            raise
        except Exception as error:  # ONNX Runtime has a class of exception for each reason
            raise InputDataError(f"The model doesn't run on sample {sample + 1}: {first_line(error)}.") from error
        outputs = dict(zip(session.outputs, arrays, strict=True))
        for name in [name for name in outputs if name in self._shown]:
            self.received.setdefault(self._shown[name], {})[sample] = outputs.pop(name)[:, 0]
        return outputs

    def close(self) -> None:
        """Forget everything."""
        self.carried.close()
        self.received.clear()

    def _share(self, sample: int) -> Array:
        """What each query counts in the mean of the attention, [batch, 1, queries]."""
        valid = self.valid[sample]
        if valid is None:
            valid = np.ones(self.sizes[sample], dtype=np.bool_)
        shares = valid / np.maximum(valid.sum(axis=1, keepdims=True), 1)
        return np.asarray(shares[:, None], dtype=np.float32)
