"""The errors a caller can meet, one family: ``except HetLoRAError`` catches them all."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class HetLoRAError(Exception):
    """Base of every error this library raises on purpose."""


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


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """An error line with the nearest names first and all of them sorted."""
    known = sorted(known)
    near = sorted(get_close_matches(str(name), known, n=3, cutoff=0.5))
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return f"unknown {what} {name!r}; {hint}known: {known or 'none'}"
