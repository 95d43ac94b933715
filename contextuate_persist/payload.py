"""Exact JSON: what of a payload goes into the queryable column, and what into the exact sidecar.

Neither jsonb nor MySQL's JSON holds every JSON object that Python can: NUL, lone surrogates,
integers past 64 bits, large floats and deep nesting fail or come back changed. Such a payload is
kept whole, as bytes, in the sidecar; the column then holds the closest queryable projection.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import orjson

from contextuate_persist.errors import InvalidRecord, PersistenceError

T = TypeVar("T")

#: Bytes of UTF-8 JSON that a payload may have, on both databases. Four of them fit MySQL's default
#: max_allowed_packet (64 MiB), which a statement of escaped text may need.
MAX_PAYLOAD_BYTES = 16 * 2**20
#: Containers inside one another, the payload itself included. Python's own json module stops near
#: 1,000, less the depth of its caller.
MAX_DEPTH = 512

# Above this a payload lies in the sidecar: nobody searches it, bytea and LONGBLOB need no parsing,
# and MySQL cannot read back a JSON value whose text outgrows the packet limit (number lists do).
_SIDECAR_BYTES = 2**20
_SIDECAR_DEPTH = 64  # MySQL's JSON ends at 100
_SIDECAR_KEY = 16_383  # characters; MySQL's keys end at 65,535 bytes
_EXACT_INTEGERS = 2**53  # jsonb turns larger floats into integers, MySQL keeps 64 bits
_NOT_IN_COLUMNS = re.compile("[\x00\ud800-\udfff]")
_ESCAPED_NUL = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")

_OUTLINE_BYTES = 2**18
_OUTLINE_TEXT = 1_000
_OUTLINE_DEPTH = 8


class Encoded(NamedTuple):
    """An event's payload ready to store: JSON for the column, and the sidecar or None."""

    json: bytes
    exact: bytes | None


def encode(data: dict[str, Any], working_directory: str = "") -> Encoded:
    """Encode a payload, and the one free text that is stored beside it.

    Raises InvalidRecord, naming the place, for what cannot be kept exactly: NaN and infinity, keys
    that are no strings, values that JSON does not have (tuples, dates, bytes ...), and what is over
    MAX_PAYLOAD_BYTES or MAX_DEPTH.
    """
    return _beside(*_encode_data(data), working_directory)


def snapshot(data: dict[str, Any]) -> bytes | None:
    """JSON that tells a payload exactly, as it is now; None if only `encode` can tell it.

    That takes less than half of the time that `encode` does, and `encode_snapshot` does the rest
    when nobody waits. Raises InvalidRecord as `encode` does.
    """
    if _survey(data):
        try:
            text = orjson.dumps(data)
        except TypeError:
            return None
        if len(text) <= _SIDECAR_KEY:  # in a longer one a key may be too long for a column
            # A copy: what orjson gives takes up all that it has grown in. Texts of 1.3 kB that are
            # kept then take 1.3 kB of memory instead of 6.6, and a `put` 3 µs less for its pages.
            return bytes(memoryview(text))
    return None


def encode_snapshot(text: bytes, working_directory: str) -> Encoded:
    """What `encode` makes of the payload that `snapshot` was given."""
    if _has_nul(text):
        return encode(orjson.loads(text), working_directory)
    return _beside(text, None, working_directory)


def _beside(text: bytes, exact: bytes | None, working_directory: str) -> Encoded:
    parts = [] if exact is None else [b'"data":' + exact]
    if not fits_text(working_directory):
        parts.append(b'"working_directory":' + exact_json(working_directory))
    return Encoded(text, b"{" + b",".join(parts) + b"}" if parts else None)


def decode(
    text: bytes | bytearray | str, exact: bytes | None, working_directory: str = ""
) -> tuple[dict[str, Any], str]:
    """What `encode` was given; raises PersistenceError for a column that holds no payload.

    MySQL reads a JSON value that has outgrown its packet limit as '', without an error.
    """
    try:
        kept = {} if exact is None else loads_exact(exact)
        data = kept["data"] if "data" in kept else orjson.loads(text)
    except ValueError as error:
        raise PersistenceError(f"a stored payload cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise PersistenceError("a stored payload is not a JSON object")
    return data, kept.get("working_directory", working_directory)


def _encode_data(data: dict[str, Any]) -> tuple[bytes, bytes | None]:
    if _survey(data):
        try:
            text = orjson.dumps(data)
        except TypeError:
            pass  # a lone surrogate, which only the standard encoder writes, or a key of no text
        else:
            _check_size(len(text))
            if len(text) > _SIDECAR_BYTES:
                return orjson.dumps(_outline(data)), text
            if not _has_nul(text) and (len(text) <= _SIDECAR_KEY or _keys_fit(data)):
                return text, None
    _keys_fit(data)
    exact = exact_json(data)
    _check_size(len(exact))
    if len(exact) <= _SIDECAR_BYTES:
        text = orjson.dumps(_on_a_whole_stack(_project, data, 1))
        if len(text) <= _SIDECAR_BYTES:
            return text, exact
    return orjson.dumps(_outline(data)), exact


# Not ensure_ascii: its escapes would join a high and a low surrogate that stand side by side.
_EXACT = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def exact_json(value: Any) -> bytes:
    """JSON that `loads_exact` reads back equal; raises InvalidRecord for what JSON has not."""
    try:
        text = _on_a_whole_stack(_EXACT.encode, value)
    except (ValueError, TypeError) as error:
        raise InvalidRecord(f"data: cannot be kept: {error}") from error
    return text.encode("utf-8", "surrogatepass")


def loads_exact(exact: bytes) -> Any:
    """What `exact_json` was given, lone surrogates and large integers included."""
    # orjson would need no frames, but rounds integers past 64 bits.
    return _on_a_whole_stack(json.loads, bytes(exact).decode("utf-8", "surrogatepass"))


def contains(document: Any, part: Any) -> bool:
    """Whether `part` is contained in `document`, by the rule of jsonb's `@>`, exactly.

    An object contains another if it has all its keys with values that contain theirs; an array, if
    each item of the other is contained in one of its own; anything else, if it is equal. True is
    not 1, and 1 is 1.0. The databases' own operators differ in detail; they only preselect.
    """
    return _on_a_whole_stack(_contains, document, part)


def _contains(document: Any, part: Any) -> bool:
    # Plain loops: one frame for each level, so that 512 levels fit Python's stack.
    if isinstance(part, Mapping):
        if not isinstance(document, Mapping):
            return False
        for key, wanted in part.items():
            if key not in document or not _contains(document[key], wanted):
                return False
        return True
    if isinstance(part, list):
        if not isinstance(document, list):
            return False
        for wanted in part:
            for item in document:
                if _contains(item, wanted):
                    break
            else:
                return False
        return True
    if isinstance(part, bool) or isinstance(document, bool):
        return part is document
    return bool(part == document)


def _on_a_whole_stack(work: Callable[..., T], *arguments: Any) -> T:
    """Do what takes a frame for each level, also where the caller's frames leave too few.

    Raises ValueError for what no stack is enough for; a RecursionError says nothing but that the
    caller has come too far itself.
    """
    try:
        return work(*arguments)
    except RecursionError:
        with ThreadPoolExecutor(1) as thread:  # begins without any
            done = thread.submit(work, *arguments)
    try:
        return done.result()
    except RecursionError:
        raise ValueError("nested too deep") from None


def fits_text(text: str) -> bool:
    """Whether a text column of either database holds this text exactly."""
    if text.isascii():  # ten times as fast, and mostly true
        return "\0" not in text
    return not _NOT_IN_COLUMNS.search(text)


def column_text(text: str) -> str:
    """The text as a text column can hold it: NUL and lone surrogates become U+FFFD."""
    return text if fits_text(text) else _NOT_IN_COLUMNS.sub("\ufffd", text)


def pack_text(text: str) -> str:
    """Wrap a text that no column holds into one that every JSON column does."""
    return base64.b64encode(text.encode("utf-8", "surrogatepass")).decode("ascii")


def unpack_text(packed: str) -> str:
    """The text that `pack_text` was given."""
    return base64.b64decode(packed).decode("utf-8", "surrogatepass")


def _check_size(size: int) -> None:
    if size > MAX_PAYLOAD_BYTES:
        raise InvalidRecord(f"data: {size:,} bytes of JSON, at most {MAX_PAYLOAD_BYTES:,} are kept")


# Every such value fits, whatever it is; mostly it is a text.
_PLAIN = frozenset({str, bool, type(None)})


def _has_nul(text: bytes) -> bool:
    # Four digits are found three times as fast as with what stands before them.
    at = text.find(b"0000")
    while at >= 0:
        if text.startswith(b"\\u", max(0, at - 2)):
            return bool(_ESCAPED_NUL.search(text))
        at = text.find(b"0000", at + 1)
    return False


def _keys_fit(data: dict[str, Any]) -> bool:
    """Whether all keys fit the JSON columns; raises InvalidRecord for one that is no text.

    Not part of the survey, which would take a half longer: orjson takes no other keys, either.
    """
    fits = True
    level: list[Any] = [data]
    while level:
        below: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                for key in dict.keys(node):
                    if not isinstance(key, str):
                        raise _fault(data, key, is_key=True)
                    if len(key) > _SIDECAR_KEY:
                        fits = False
            values = dict.values(node) if isinstance(node, dict) else list.__iter__(node)
            below += [value for value in values if isinstance(value, dict | list)]
        level = below
    return fits


def _survey(data: dict[str, Any]) -> bool:  # noqa: C901, PLR0912  (one loop, once per value)
    """Whether all values fit the JSON columns; raises InvalidRecord for what no JSON holds.

    orjson alone would write NaN as null and dates as strings without a word. Level by level, so
    that depth costs no recursion; the place of a fault is only looked for once there is one.
    """
    fits = True
    level: list[Any] = [data]
    depth = containers = 0
    while level:
        depth += 1
        containers += len(level)
        if containers > MAX_PAYLOAD_BYTES // 2:  # two brackets each; or one in itself, many times
            raise InvalidRecord("data: more values than a payload may have")
        if depth > MAX_DEPTH:
            raise InvalidRecord(f"data: nested more than {MAX_DEPTH} deep")
        below: list[Any] = []
        for node in level:
            # As orjson reads it, whatever a subclass says that it holds.
            for value in dict.values(node) if isinstance(node, dict) else list.__iter__(node):
                kind = type(value)
                if kind in _PLAIN:
                    continue
                if kind is int:
                    if not -(2**63) <= value < 2**64:
                        fits = False
                elif isinstance(value, dict | list):
                    below.append(value)
                elif isinstance(value, float):
                    if not math.isfinite(value):
                        raise _fault(data, value)
                    # jsonb also forgets the sign of -0.0.
                    if abs(value) >= _EXACT_INTEGERS or (not value and math.copysign(1, value) < 0):
                        fits = False
                elif isinstance(value, str | int):
                    fits = False  # a subclass: the standard encoder writes its plain value
                else:
                    raise _fault(data, value)
        level = below
    return fits and depth <= _SIDECAR_DEPTH


def _fault(data: Any, culprit: object, *, is_key: bool = False) -> InvalidRecord:
    """Say where in the payload the culprit is, and what it is."""
    stack: list[tuple[str, Any]] = [("data", data)]
    while stack:
        place, node = stack.pop()
        items = dict.items(node) if isinstance(node, dict) else enumerate(list.__iter__(node))
        for key, value in items:
            if is_key and isinstance(node, dict) and key is culprit:
                return InvalidRecord(f"{place}: the key {_shown(key)} is not a string")
            here = f"{place}.{_shown(key)[1:-1]}" if isinstance(key, str) else f"{place}[{key}]"
            if not is_key and value is culprit:
                if isinstance(value, float):
                    return InvalidRecord(f"{here}: JSON has no {value}")
                hint = " (make it a list)" if isinstance(value, tuple) else ""
                return InvalidRecord(f"{here}: JSON has no {type(value).__name__}{hint}")
            if isinstance(value, dict | list):
                stack.append((here, value))
    raise AssertionError("the culprit was seen a moment ago")  # pragma: no cover


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 40 else text[:36] + "..." + text[-1]


def _project(value: Any, depth: int) -> Any:
    """The closest value that both databases' JSON columns hold."""
    if isinstance(value, str):
        return column_text(value)
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else _nearest_float(value)
    if isinstance(value, float):
        return float(value)
    if depth >= _SIDECAR_DEPTH:
        return None
    if isinstance(value, dict):
        return {
            column_text(key[:_SIDECAR_KEY]): _project(item, depth + 1)
            for key, item in value.items()
        }
    return [_project(item, depth + 1) for item in value]


def _nearest_float(value: int) -> float | str:
    try:
        return float(value)
    except OverflowError:
        return column_text(str(value))


def _outline(data: dict[str, Any]) -> Any:
    """A small projection of a large payload: the beginning of everything, long texts cut."""
    left = _OUTLINE_BYTES

    def outline(value: Any, depth: int) -> Any:
        nonlocal left
        if isinstance(value, str):
            value = column_text(value[:_OUTLINE_TEXT])
            left -= 4 * len(value)
            return value
        left -= 24  # the longest number, or brackets
        if not isinstance(value, dict | list):
            return _project(value, depth)
        if depth > _OUTLINE_DEPTH:
            return None
        kept: Any = {} if isinstance(value, dict) else []
        for item in value:
            if left <= 0:
                break
            if isinstance(value, dict):
                key = outline(item, depth)
                kept[key] = outline(value[item], depth + 1)
            else:
                kept.append(outline(item, depth + 1))
        return kept

    return outline(data, 1)
