"""What a pass is: an `onnx_ir` pass that also states its guarantee and reports on every site it looked at."""

from __future__ import annotations

import abc
import dataclasses
import enum
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import onnx_ir as ir

from graphopt.analysis.profile import Profile, preferred
from graphopt.calibration.calibration import Calibration
from graphopt.graph.assumptions import NOTHING, Assumptions, Reliance, note
from graphopt.graph.edits import Editor, walk
from graphopt.graph.session_settings import request

LOWERED = "graphopt.lowered"
"""In `ir.Node.meta` of what a pass wrote for a target, where a raise pass would take it for its own: it leaves it."""


class Guarantee(enum.Enum):
    """What a pass promises about the numbers."""

    EXACT = "exact"
    """Equal up to floating-point reordering; proved to 1e-12 relative in float64 by its tests."""
    LOSSY = "lossy"
    """Changes the function; runs only where a recipe or a budget asks for it."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One place that a pass looked at.

    Attributes:
        node: Name of the anchor node.
        op_type: Operator of the anchor node.
        outcome: "applied" or "left".
        detail: What was done, or why nothing was.
    """

    node: str
    op_type: str
    outcome: Literal["applied", "left"]
    detail: str


class Pass(ir.passes.InPlacePass):
    """Base of graphopt's passes.

    A subclass sets the class attributes, takes its options as keyword arguments of `__init__`
    and implements `apply`. Its docstring is its documentation page (see docs/write-a-pass.md).

    Attributes:
        name: The name used by recipes and the CLI, in kebab-case.
        family: The folder that it lives in.
        guarantee: `Guarantee.EXACT` or `Guarantee.LOSSY`.
        bitwise: True where nothing but structure changes, so that results must be equal bit for bit.
        paper: Title of the source, or an empty string.
        needs: What the pass reads of calibration data, such as "second-moment"; where it isn't empty the pass runs only
            with data, as `self.calibration`. An instance may set it by its options.
        targets: The targets that the pass is for; empty: all. Elsewhere a recipe goes on without it, or is refused if
            it is lossy.
        portable: Options that a recipe gives it for the target "portable", where the recipe doesn't say otherwise.
    """

    name: ClassVar[str]
    family: ClassVar[str]
    guarantee: ClassVar[Guarantee] = Guarantee.EXACT
    bitwise: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    needs: tuple[str, ...] = ()
    targets: ClassVar[tuple[str, ...]] = ()
    portable: ClassVar[Mapping[str, Any]] = {}

    calibration: Calibration | None = None
    """Set by the pass manager on passes that name `needs`: data, and what runs a model on it piece by piece."""
    profile: Profile | None = None
    """Set by the pass manager: what was measured of the target; None: nothing, and the safe defaults hold."""
    assumptions: Assumptions = NOTHING
    """Set by the pass manager: what may be taken for granted about inputs; see `rely_on`."""

    def __init__(self) -> None:
        self.sites: list[Site] = []

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """What onnx_ir calls; see `apply`."""
        self.sites = []
        return ir.passes.PassResult(model, self.apply(model))

    @abc.abstractmethod
    def apply(self, model: ir.Model) -> bool:
        """Rewrite `model` in place and return whether anything changed."""

    def applied(self, node: ir.Node, detail: str) -> bool:
        """Record that the site at `node` was rewritten; returns True, for `return self.applied(...)`."""
        self.sites.append(Site(node.name or "", node.op_type, "applied", detail))
        return True

    def left(self, node: ir.Node, reason: str) -> bool:
        """Record why the site at `node` was left alone; returns False, for `return self.left(...)`."""
        self.sites.append(Site(node.name or "", node.op_type, "left", reason))
        return False

    def prefers(self, choice: str, width: int | None = None, rows: int | None = None) -> str:
        """The alternative of a choice (see `graphopt.analysis.choices`) that is never slower than its default on the
        target, and faster at some usual shape; the default where nothing was measured.

        Args:
            choice: Name of the choice.
            width: Features or channels at the site, where they are known.
            rows: Tokens or pixels at the site, where the graph fixes them.
        """
        return preferred(self.profile, choice, width, rows)

    def ask_session(self, model: ir.Model, setting: str, value: str, reason: str) -> bool:
        """Note in `model` that sessions should be made with a setting that the graph itself can't hold; returns
        whether that is new. See `graphopt.graph.session_settings.request`."""
        return request(model, setting, value, reason)

    def rely_on(self, model: ir.Model, assumption: str, inputs: Mapping[str, str], reason: str) -> bool:
        """Note in `model` that a rewrite is right only where an assumption holds, which must be one that
        `self.assumptions.holds`; returns whether that is new. The result is judged on what is left of the domain, and
        `graphopt.session` refuses other inputs.

        Args:
            model: The model.
            assumption: Its name (see `graphopt.graph.assumptions`): the weakest that is enough.
            inputs: Names of the model's inputs by role: "mask", "ids", "past".
            reason: What needs it, as a phrase for the report.

        Raises:
            ValueError: It isn't assumed, or `inputs` don't show whether it holds.
        """
        if not self.assumptions.holds(assumption):
            raise ValueError(f"the pass relies on {assumption}, which wasn't assumed")
        return note(model, Reliance(assumption, dict(inputs), reason, self.name))

    @classmethod
    def options(cls) -> dict[str, inspect.Parameter]:
        """The options of the pass by name, from the signature of its `__init__`."""
        if cls.__init__ is Pass.__init__:
            return {}
        parameters = inspect.signature(cls.__init__).parameters
        return {name: p for name, p in parameters.items() if name != "self"}

    def option_values(self) -> dict[str, Any]:
        """The options in force, for the report."""
        return {name: getattr(self, name) for name in self.options() if hasattr(self, name)}


class SearchPass(Pass):
    """A pass that may search for what it changes.

    Attributes:
        scores: What each candidate scored by itself, where that was found.
        expected: The divergence of the outputs from the original's with what was chosen, where that was found.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scores: dict[str, float] = {}
        self.expected: float | None = None

    def option_values(self) -> dict[str, Any]:
        """See the base; with what was found, once it is."""
        found: dict[str, Any] = {"scores": self.scores} if self.scores else {}
        if self.expected is not None:
            found["expected_divergence"] = self.expected
        return {**super().option_values(), **found}


class RulePass(Pass):
    """A pass made of local rewrites, each tried at nodes of the anchor operators only.

    The sites of all graphs (subgraphs and function bodies too) go on a work list in topological order.
    An edit puts its neighbourhood back on the list, so that the pass ends at a fixed point in time
    linear in the number of nodes and edits.
    """

    anchors: ClassVar[tuple[str, ...]] = ()
    """Operators (default domain, or "domain::Op") at which `rewrite` is tried."""

    def prepare(self, model: ir.Model, edit: Editor) -> None:
        """Compute what the rules need before the first site, for example an analysis."""

    @abc.abstractmethod
    def rewrite(self, node: ir.Node, edit: Editor) -> bool:
        """Try to rewrite the site at `node` through `edit`; return whether the graph changed."""

    def apply(self, model: ir.Model) -> bool:
        """Try `rewrite` at every anchor until nothing changes."""
        edit = Editor(model)
        self.prepare(model, edit)
        pending: dict[ir.Node, None] = dict.fromkeys(
            node for graph in walk(model) for node in graph if qualified(node) in self.anchors
        )
        # Sites are looked at in rounds; reasons are kept for the last look at a node only.
        verdicts: dict[ir.Node, list[Site]] = {}
        changed = False
        while pending:
            node = next(iter(pending))
            del pending[node]
            if node.graph is None:  # removed by an earlier edit
                continue
            seen, self.sites = self.sites, []
            edit.at(node)
            if self.rewrite(node, edit):
                changed = True
                seen.extend(self.sites)
                verdicts.pop(node, None)
                for neighbour in edit.drain_touched():
                    if neighbour.graph is not None and qualified(neighbour) in self.anchors:
                        pending[neighbour] = None
            elif self.sites:
                verdicts[node] = self.sites
            self.sites = seen
        for node, sites in verdicts.items():
            if node.graph is not None:
                self.sites.extend(sites)
        return changed


def qualified(node: ir.Node) -> str:
    """The operator of `node` as written in `RulePass.anchors`."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
