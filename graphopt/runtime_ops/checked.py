"""Sessions that refuse inputs for which a model isn't right, before they run.

What a model takes for granted is in its metadata (`graphopt.graph.assumptions`). Shapes and the attention mask are
looked at, nothing else, and only where they lie on the host:

- `run`, `run_async`: arrays and lists, and OrtValues of the CPU;
- `run_with_ort_values`: the shapes of all OrtValues, and the mask where it is one of the CPU;
- `run_with_iobinding`: the same of inputs bound through this session's own `io_binding()` with `bind_cpu_input` and
  `bind_ortvalue_input`; of those bound by a pointer (`bind_input`) the shapes. Inputs of a binding that was made
  otherwise aren't seen.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from graphopt.errors import AssumptionError, ModelError
from graphopt.graph.assumptions import Reliance, meaning, outside

if TYPE_CHECKING:
    import onnxruntime
    from onnxruntime import InferenceSession as SessionBase
    from onnxruntime import IOBinding as BindingBase
else:
    SessionBase = BindingBase = object


@dataclasses.dataclass(frozen=True)
class Unseen:
    """An input of which only the shape is known on the host."""

    shape: tuple[int, ...]

    def device_name(self) -> str:
        """No device whose memory can be read here."""
        return ""


class CheckedBinding(BindingBase):  # type: ignore[misc]
    """What an IOBinding does, and remembers the inputs that a check needs."""

    def __init__(self, session: Any, names: frozenset[str]) -> None:
        super().__init__(session)
        self.names = names
        self.seen: dict[str, Any] = {}

    def bind_cpu_input(self, name: str, arr_on_cpu: Any) -> None:
        """See `onnxruntime.IOBinding`."""
        super().bind_cpu_input(name, arr_on_cpu)
        self._remember(name, arr_on_cpu)

    def bind_ortvalue_input(self, name: str, ortvalue: Any) -> None:
        """See `onnxruntime.IOBinding`."""
        super().bind_ortvalue_input(name, ortvalue)
        self._remember(name, ortvalue)

    def bind_input(self, name: str, *args: Any, **kwargs: Any) -> None:
        """See `onnxruntime.IOBinding`."""
        super().bind_input(name, *args, **kwargs)
        shape = kwargs.get("shape", args[3] if len(args) > 3 else None)
        self._remember(name, None if shape is None else Unseen(tuple(shape)))

    def clear_binding_inputs(self) -> None:
        """See `onnxruntime.IOBinding`."""
        super().clear_binding_inputs()
        self.seen.clear()

    def _remember(self, name: str, value: Any) -> None:
        if name in self.names:
            self.seen[name] = value


class CheckedSession(SessionBase):  # type: ignore[misc]
    """What an InferenceSession does, after a look at the inputs."""

    relied: tuple[Reliance, ...] = ()
    """What the model takes for granted; set by `checked_session`."""

    def run(self, output_names: Any, input_feed: Any, run_options: Any = None) -> Any:
        """See `onnxruntime.InferenceSession`.

        Raises:
            AssumptionError: The model isn't right for these inputs.
        """
        self._check(input_feed)
        return super().run(output_names, input_feed, run_options)

    def run_async(
        self, output_names: Any, input_feed: Any, callback: Any, user_data: Any, run_options: Any = None
    ) -> Any:
        """See `onnxruntime.InferenceSession`; raises as `run` does."""
        self._check(input_feed)
        return super().run_async(output_names, input_feed, callback, user_data, run_options)

    def run_with_ort_values(self, output_names: Any, input_dict_ort_values: Any, run_options: Any = None) -> Any:
        """See `onnxruntime.InferenceSession`; raises as `run` does."""
        self._check(input_dict_ort_values)
        return super().run_with_ort_values(output_names, input_dict_ort_values, run_options)

    def io_binding(self) -> Any:
        """A binding whose host inputs are checked by `run_with_iobinding`."""
        names = frozenset(name for entry in self.relied for name in entry.inputs.values())
        return _binding_class()(self, names)

    def run_with_iobinding(self, iobinding: Any, run_options: Any = None) -> Any:
        """See `onnxruntime.InferenceSession`; raises as `run` does."""
        self._check(getattr(iobinding, "seen", {}))
        return super().run_with_iobinding(iobinding, run_options)

    def _check(self, feeds: Mapping[str, Any]) -> None:
        found = outside(self.relied, feeds)
        if found is not None:
            entry, what = found
            raise AssumptionError(
                f"The model was optimized for {entry.assumption} ({meaning(entry.assumption)}), but {what}; to run "
                "such inputs, optimize the original again without assuming that."
            )


def checked_session(relied: Sequence[Reliance]) -> Callable[..., onnxruntime.InferenceSession]:
    """What makes sessions, with the arguments of `onnxruntime.InferenceSession`, that refuse what `relied` rules out.

    Raises:
        ModelError: From what is returned: the model lacks an input that would show whether an assumption holds.
    """

    def make(*args: Any, **kwargs: Any) -> onnxruntime.InferenceSession:
        session = _session_class()(*args, **kwargs)
        session.relied = tuple(relied)
        known = {value.name for value in session.get_inputs()}
        missing = [name for entry in relied for name in entry.inputs.values() if name not in known]
        if missing:
            raise ModelError(
                f"the model takes for granted what its input {missing[0]!r} shows, but has no such input; "
                "open it with check=False, or optimize the original again."
            )
        return session

    return make


@functools.cache
def _session_class() -> type[CheckedSession]:
    import onnxruntime

    return type("CheckedSession", (CheckedSession, onnxruntime.InferenceSession), {})


@functools.cache
def _binding_class() -> type[CheckedBinding]:
    import onnxruntime

    return type("CheckedBinding", (CheckedBinding, onnxruntime.IOBinding), {})
