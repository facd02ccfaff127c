"""The errors a caller can meet, one family: ``except HetLoRAError`` catches them all."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

MOST = 3000
"""Characters of a message: what a caller passed as a path or a name may be of any length."""


class HetLoRAError(Exception):
    """Base of every error this library raises on purpose.

    As text it says where at its start and what to do at its end: a message of more than 3,000
    characters is shown without its middle. ``args`` keeps it whole.
    """

    def __str__(self) -> str:
        text = super().__str__()
        half = MOST // 2
        return text if len(text) <= MOST else f"{text[:half]} … {text[-half:]}"


class InputValueError(HetLoRAError, ValueError):
    """A value is wrong: a shape, a rank, a weight, an entry, an option's value."""


class OptionValueError(InputValueError):
    """An option's value is wrong, whoever the clients are."""


class InputTypeError(HetLoRAError, TypeError):
    """A type is wrong: not a tensor, an integer dtype, an option that does not exist."""


class ConvergenceError(HetLoRAError, ArithmeticError):
    """Every decomposition in the ladder failed, or a result left the range of its dtype."""


class MemoryLimitError(HetLoRAError, MemoryError):
    """Something needs more memory than ``memory_limit=`` allows; raised before it is allocated."""


class ProcessLostError(HetLoRAError, RuntimeError):
    """Another process died, fell silent, or stopped at an error of its own."""


def shown(value: object, most: int = 200) -> str:
    """How an error quotes what it was given: its repr, as much of it as fits a message."""
    try:
        text = repr(value)
    except Exception:
        # Nested deeper than Python follows, an integer longer than it writes, or a repr that fails.
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= most else f"{text[:most]}…"


def quoted(error: Exception, most: int = 400) -> str:
    """What another library says of a file, as much as fits a message: it may quote the file."""
    text = str(error)
    return text if len(text) <= most else f"{text[:most]}…"


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """An error line with the nearest names first and all of them sorted."""
    known = sorted(known)
    # Comparing takes time with the square of the length; no name is that long.
    text = name[:100] if isinstance(name, str) else shown(name, 100)
    near = sorted(get_close_matches(text, known, n=3, cutoff=0.5))
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"unknown {what} {shown(name)}; {hint}known: {known or 'none'}"
