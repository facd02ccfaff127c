"""What mkdocstrings must know of the house style: a Griffe extension.

``Example:`` is a section of doctests here, which Griffe calls ``Examples:``. Paragraphs such as
``Cost:`` and ``Fidelity:`` get their title in bold. A literal block after ``::`` is Markdown's
indented one. A return value is described in prose, so it has no type in front of its colon.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

TITLES = ("Cost", "Reference", "Fidelity", "Deviations")


def markdown(text: str) -> str:
    """A docstring as Griffe's Google style and Markdown read it."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
    text = re.sub(rf"^({'|'.join(TITLES)}): ", r"**\1:** ", text, flags=re.M)
    # What stands before a colon there would be taken for a type.
    text = re.sub(r"^(Returns:\n[^\n:]*):", r"\1&#58;", text, flags=re.M)
    return re.sub(r"::$", ":", text, flags=re.M)


class HouseStyle(griffe.Extension):
    """Rewrites every docstring before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = markdown(obj.docstring.value)
