"""What a model asks of the session that runs it, because a graph can't hold it: an entry of the model's metadata."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import onnx_ir as ir

from graphopt.errors import ModelError

SETTINGS_KEY = "graphopt.session"
"""Metadata key under which a model says what a session should set: JSON with "config" (session configuration entries),
"disabled_optimizers" (names) and "reasons" (a sentence for each of them)."""
DISABLED_OPTIMIZERS = "disabled_optimizers"


@dataclasses.dataclass
class SessionSettings:
    """What a model asks of a session.

    Attributes:
        config: Session configuration entries.
        disabled_optimizers: Names of ONNX Runtime's optimizers.
        reasons: Why, by configuration key or name of an optimizer.
    """

    config: dict[str, str] = dataclasses.field(default_factory=dict)
    disabled_optimizers: list[str] = dataclasses.field(default_factory=list)
    reasons: dict[str, str] = dataclasses.field(default_factory=dict)

    def listed(self) -> list[tuple[str, str, str]]:
        """(setting, value, reason) of each, for a report."""
        rows = [(key, value, self.reasons.get(key, "")) for key, value in sorted(self.config.items())]
        if names := sorted(self.disabled_optimizers):
            reasons = dict.fromkeys(self.reasons[n] for n in names if n in self.reasons)
            rows.append((DISABLED_OPTIMIZERS, ", ".join(names), "; ".join(reasons)))
        return rows


def read(model: ir.Model) -> SessionSettings:
    """What `model` asks for; empty where it asks for nothing.

    Raises:
        ModelError: The metadata isn't what graphopt writes.
    """
    text = model.metadata_props.get(SETTINGS_KEY)
    if text is None:
        return SessionSettings()
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ModelError(f"the metadata entry {SETTINGS_KEY!r} isn't valid JSON ({error}).") from error
    if not isinstance(data, dict):
        raise ModelError(f"the metadata entry {SETTINGS_KEY!r} must be a JSON object.")
    config, disabled = data.get("config") or {}, data.get(DISABLED_OPTIMIZERS) or []
    reasons = data.get("reasons") or {}
    if not (isinstance(config, dict) and isinstance(disabled, list) and isinstance(reasons, dict)):
        raise ModelError(f"the metadata entry {SETTINGS_KEY!r} doesn't hold settings of a session.")
    return SessionSettings(_strings(config), [str(name) for name in disabled], _strings(reasons))


def request(model: ir.Model, setting: str, value: str, reason: str) -> bool:
    """Let `model` ask for a setting; returns whether it didn't before.

    Args:
        model: The model, whose metadata is changed.
        setting: A session configuration key, such as "session.set_denormal_as_zero", or "disabled_optimizers".
        value: The entry's value, or the name of one optimizer of ONNX Runtime.
        reason: Why, as a phrase for the report.
    """
    settings = read(model)
    if setting == DISABLED_OPTIMIZERS:
        if value in settings.disabled_optimizers:
            return False
        settings.disabled_optimizers = sorted([*settings.disabled_optimizers, value])
        settings.reasons[value] = reason
    else:
        if settings.config.get(setting) == value:
            return False
        settings.config[setting] = value
        settings.reasons[setting] = reason
    model.metadata_props[SETTINGS_KEY] = json.dumps(dataclasses.asdict(settings), sort_keys=True)
    return True


def _strings(data: dict[Any, Any]) -> dict[str, str]:
    return {str(key): str(value) for key, value in data.items()}
