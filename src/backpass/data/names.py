"""Text form of a data set: a name or a folder, and settings of how it is read."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from backpass.errors import BackpassError, UnknownNameError

__all__ = ["HUB", "DataName", "base_name", "read_name"]

HUB = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
"""Repositories on the Hugging Face hub by short name."""

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, kw_only=True)
class DataName:
    """Name of a data set and settings of how it is read.

    Attributes:
        name: ``digits``, a short name, ``owner/name`` on the hub, or a folder.
        image: column of images; None: ``image`` or ``img``.
        label: column of labels; None: ``label`` or ``labels``.
        config: configuration (folder) of a data set of the hub.
        revision: commit, branch or tag of the hub; None: the newest at the first download.
    """

    name: str
    image: str | None = None
    label: str | None = None
    config: str | None = None
    revision: str | None = None

    @property
    def repository(self) -> str | None:
        """Repository of the hub, or None."""
        if self.name in HUB:
            return HUB[self.name]
        return self.name if _REPOSITORY.fullmatch(self.name) else None


def read_name(text: str) -> DataName:
    """Read ``NAME`` or ``NAME:setting=value,...``.

    Raises:
        UnknownNameError: the setting is unknown.
        BackpassError: there is no name, or the settings have another form.
    """
    if not text.partition(":")[0].strip():
        raise BackpassError(f"expected the name of a data set, such as mnist, or a folder; got {text!r}.")
    name, _, rest = text.partition(":")
    if "=" not in rest:
        return DataName(name=text)  # a colon may stand in the name of a folder
    known = [field.name for field in fields(DataName) if field.name != "name"]
    settings: dict[str, str] = {}
    for part in rest.split(","):
        setting, equals, value = map(str.strip, part.partition("="))
        if not equals or not value:
            raise BackpassError(
                f"cannot read {part!r} in {text!r}: expected setting=value, several with commas between."
            )
        if setting not in known:
            raise UnknownNameError("setting of data", setting, known)
        settings[setting] = value
    return DataName(name=name, **settings)


def base_name(text: str) -> str:
    """Return the short name of a data set, such as ``mnist`` for ``ylecun/mnist:revision=main``."""
    name = read_name(text)
    return next((short for short, long in HUB.items() if name.repository == long), name.name)
