"""Names of parametrized tests that are the same in every process, which tests in parallel need."""

import re

__all__ = ["name_of"]

_PLAIN = (bool, int, float, str, type(None))


def name_of(value):
    """A value in a few words, without the addresses of functions and the numbers of tensors."""
    if isinstance(value, dict):
        return " ".join(f"{key}={one}" if isinstance(one, _PLAIN) else str(key) for key, one in value.items())
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))[:80]
