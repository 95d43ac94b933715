"""What of a payload is worth keeping: trimming of bulky copies, and a size for the rest.

Off by default. Recorded stores consist of such copies to 90 %: the whole file before an edit, the
base64 text of an image that was read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from contextuate_persist.errors import ConfigurationError, InvalidRecord
from contextuate_persist.payload import MAX_DEPTH, exact_json


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadPolicy:
    """How payloads are trimmed before they are stored; sizes are bytes of UTF-8.

    Each text that was taken out is told in the payload's `trimmed`: its path (a JSON Pointer), its
    bytes and their SHA-256. In its place stands null.
    """

    mirrors: bool = True
    """Take out `originalFile` of edits and base64 of files and images, from `mirror_bytes` on."""
    mirror_bytes: int = 1024
    max_bytes: int | None = None
    """Take out the largest texts, too, until the payload has so many bytes at most."""

    def __post_init__(self) -> None:
        """Raise ConfigurationError for sizes that make no sense."""
        for name in ("mirror_bytes", "max_bytes"):
            size = getattr(self, name)
            if size is not None and (type(size) is not int or size < 1024):
                raise ConfigurationError(f"{name}: {size!r} is not a number of bytes, 1024 or more")

    def apply(self, data: dict[str, Any]) -> dict[str, Any]:
        """The payload as it is to be kept; the same object if there is nothing to do.

        With `max_bytes`, texts of 256 bytes and more are taken out, no others.
        """
        if not isinstance(data.get(TRIMMED, []), list):
            return data  # somebody else's word, which is not ours to change
        texts = _texts(data)
        if texts is None:
            return data
        texts.sort(key=lambda text: -text.size)
        chosen: dict[tuple[str | int, ...], _Text] = {}
        if self.mirrors:
            for text in texts:
                if text.mirror and text.size >= self.mirror_bytes:
                    chosen[text.path] = text
        if self.max_bytes is not None:
            size = _size(data, texts) - sum(text.gain for text in chosen.values())
            for text in texts:
                if size <= self.max_bytes or text.size < _SHORTEST:
                    break
                if text.path not in chosen:
                    chosen[text.path] = text
                    size -= text.gain
        return _without(data, [*chosen.values()]) if chosen else data


#: The key of a payload under which stands what was taken out of it.
TRIMMED = "trimmed"
_SHORTEST = 256  # below that, what tells of a text is as long as the text
_MOST = 1_000_000  # values; one that stands in many places counts in each


class _Text(NamedTuple):
    path: tuple[str | int, ...]
    size: int
    raw: bytes
    mirror: bool

    @property
    def gain(self) -> int:
        """By how much the payload gets shorter, roughly."""
        return self.size - 130 - len(self.pointer)

    @property
    def pointer(self) -> str:
        names = (str(name).replace("~", "~0").replace("/", "~1") for name in self.path)
        return "".join(f"/{name}" for name in names)

    def told(self) -> dict[str, Any]:
        """What the payload says of a text that is gone."""
        digest = hashlib.sha256(self.raw).hexdigest()
        return {"path": self.pointer, "bytes": self.size, "sha256": digest}


def _texts(data: dict[str, Any]) -> list[_Text] | None:
    """All texts of a payload, with their places; None for one that cannot be kept: it is too deep.

    One that contains itself is: its paths would have no end.
    """
    texts: list[_Text] = []
    nodes: list[tuple[tuple[str | int, ...], Any]] = [((), data)]
    seen = 0
    while nodes and seen < _MOST:
        path, node = nodes.pop()
        if len(path) >= MAX_DEPTH:
            return None
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            seen += 1
            if isinstance(value, str):
                raw = value.encode("utf-8", "surrogatepass")
                texts.append(_Text((*path, key), len(raw), raw, _is_mirror(node, key)))
            elif isinstance(value, dict | list):
                nodes.append(((*path, key), value))
    return texts


def _is_mirror(node: Any, key: str | int) -> bool:
    if key == "data":  # {"type": "base64", "media_type": ..., "data": ...}
        return bool(node.get("type") == "base64")
    return key in ("originalFile", "base64")


def _size(data: dict[str, Any], texts: list[_Text]) -> int:
    try:
        return len(orjson.dumps(data))
    except TypeError:  # as what has a lone surrogate, or an integer past 64 bits
        pass
    try:
        return len(exact_json(data))
    except InvalidRecord:  # whether it can be kept at all, the store's encoder tells
        return sum(text.size for text in texts)


def _without(data: dict[str, Any], texts: list[_Text]) -> dict[str, Any]:
    """A copy of the payload with null for the texts; what they are not in is shared."""
    kept = dict(data)
    copied: dict[tuple[str | int, ...], Any] = {(): kept}
    for text in texts:
        for depth in range(1, len(text.path)):
            place = text.path[:depth]
            if place not in copied:
                node = copied[place[:-1]][place[-1]]
                copied[place] = copied[place[:-1]][place[-1]] = node.copy()
        copied[text.path[:-1]][text.path[-1]] = None
    told = [text.told() for text in sorted(texts, key=lambda text: text.pointer)]
    kept[TRIMMED] = [*data.get(TRIMMED, []), *told]
    return kept
