"""Settings of attacks as text for reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from backpass.data import Labelled
from backpass.lab.protocols import Protocol
from backpass.lab.studies.attack.plans import Plan
from backpass.lab.subjects import Subject
from backpass.numbers import fraction_text

__all__ = ["plan_settings", "protocol_settings", "subject_text", "target_text"]


def plan_settings(plans: Sequence[Plan]) -> dict[str, str]:
    """Return the settings of every attack by name of the plan."""
    return {
        plan.name: ", ".join(
            f"{name.replace('_', ' ')} {_plain(value)}"
            for name, value in asdict(plan.attack).items()
            if value is not None
        )
        for plan in plans
    }


def protocol_settings(protocol: Protocol, radii: Sequence[float]) -> dict[str, str]:
    """Return the protocol with its description, and the radii."""
    return {
        "protocol": f"{protocol.name}. {protocol.explain(radii, None)}",
        "eps": ", ".join(map(fraction_text, radii)),
    }


def target_text(data: Labelled, target: str | int) -> str:
    """Return the target class of targeted attacks as text."""
    return target if isinstance(target, str) else f"{data.class_name(target)} ({target})"


def subject_text(subject: Subject) -> str:
    """Return the name of a network with its weights."""
    return f"{subject.name}, {subject.size:,} parameters; weights: {subject.weights} (SHA-256 {subject.digest})"


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return " to ".join(map(_plain, value))
    return fraction_text(value) if isinstance(value, float) else str(value)
