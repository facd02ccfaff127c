"""Sentences that people rated, of four kinds: they come with the sources of vaderSentiment.

They are read where they were downloaded to, and are no part of this project. A rating is a mean
over people, from −4 to 4; a sentence is negative or positive from half a point on. The others, a
fifth or less but two fifths of the editorials, are left out.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SDIST = "vaderSentiment-3.3.2.tar.gz"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
DOWNLOAD = "pip download --no-deps --no-binary vaderSentiment vaderSentiment==3.3.2 -d"

FILES: Mapping[str, str] = {
    name: f"hutto_ICWSM_2014/{name}_GroundTruth.txt"
    for name in (
        "tweets",
        "movieReviewSnippets",
        "amazonReviewSnippets",
        "nytEditorialSnippets",
    )
}
"""Corpus -> its file: number, rating and sentence, between tabs."""

CLASSES = ("negative", "positive")
NEUTRAL = 0.5
"""Ratings nearer to zero than this have no class."""


@dataclass(frozen=True)
class Corpus:
    """Sentences and their classes.

    Attributes:
        texts: the sentences, each once.
        labels: `(texts,)` int64, numbers in `CLASSES`.
    """

    texts: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: np.ndarray) -> Corpus:
        """The sentences at `rows`, in that order."""
        return Corpus(tuple(self.texts[row] for row in rows), self.labels[rows])


def read_corpora(folder: Path) -> dict[str, Corpus]:
    """The four corpora, from the archive in this folder.

    Raises:
        FileNotFoundError: it is not there; the message says how to get it.
        ValueError: it is another archive than the one that was measured.
    """
    path = folder / SDIST
    if not path.is_file():
        raise FileNotFoundError(
            f"text: expected {path}, got no such file, do: {DOWNLOAD} {folder}, or: make study"
        )
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"text: {path}: expected SHA-256 {SHA256}, got {found}; delete it and do: make study"
        )
    inner = _members(content, [INNER])[INNER]
    texts = _members(inner, FILES.values())
    return {name: parse(texts[file].decode("latin-1")) for name, file in FILES.items()}


def parse(text: str) -> Corpus:
    """The corpus of a file's text, without neutral sentences; of equal ones the first counts.

    Raises:
        ValueError: a line is not a number, a rating and a sentence.
    """
    rated: dict[str, float] = {}
    # Not splitlines: in latin-1, byte 0x85 within a sentence would end a line.
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), start=1):
        if not line.strip():
            continue
        parts = line.split("\t")
        if len(parts) != 3:
            raise ValueError(
                f"text: line {number}: expected number, rating and sentence between tabs, got "
                f"{len(parts)} parts; the file is damaged"
            )
        rated.setdefault(parts[2].strip(), float(parts[1]))
    clear = {sentence: rating for sentence, rating in rated.items() if abs(rating) >= NEUTRAL}
    return Corpus(tuple(clear), np.array([x > 0 for x in clear.values()], dtype=np.int64))


def _members(archive: bytes, names: Iterable[str]) -> dict[str, bytes]:
    """Files of a compressed tar archive, in memory: nothing is unpacked onto the disk."""
    found = {}
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        for name in names:
            member = tar.extractfile(name)
            if member is None:
                raise ValueError(f"text: {name}: expected a file in the archive, got none")
            found[name] = member.read()
    return found
