"""What goes in comes out: payloads and texts on both databases, and the encoder by itself."""

from __future__ import annotations

import json
import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from decimal import Decimal
from enum import IntEnum
from functools import partial
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from contextuate_persist import (
    InvalidBatch,
    InvalidRecord,
    PersistenceError,
    payload,
)
from contextuate_persist.base import BaseStore
from tests.builders import T0, event

# Text as agents produce it, and as it breaks drivers, servers and encoders.
TRICKY = [
    "DELIMITER //\nSELECT 1 //\nDELIMITER ;",
    "it''s \" delimiter ## q## some text## '",
    'delimiter " \' ` \\" \\\' $$',
    "'; DROP TABLE sessions; --",
    "%s %(x)s %% {} {0} ? ?? :x $1 @x @@version",
    "/* comment */ -- comment\n# comment\n/*! 50000 SELECT */",
    "\\", "\\\\", "\\'", "\\0", "\\u0000", "\\\\u0000", "\\N", "\\%", "\\x00",
    "\x00", "a\x00b", "\ud800", "\udfff", "\ud83d\ude00", "\ude00\ud83d", "\ufffe\uffff",
    "\x1a\r\n\t\b\x7f\x80\x9f\u2028\u2029\u202e", "😀é\u0301ß", "NULL", "null", "", " ", "\ufeff",
    "1e400", "-0.0", "0x41", "true",
]  # fmt: skip

texts = st.one_of(
    st.sampled_from(TRICKY),
    st.text(st.characters(exclude_categories=()), max_size=40),
    st.text("'\"\\\x00;$%? DELIMTRdelimtr/\n-#*", max_size=60),
)
numbers = st.one_of(
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(
        [0.0, -0.0, 1.0, 1e16, 1e22, 1e23, 1.449e49, 9007199254740993.0, 5e-324, 1e308]
    ),
)
scalars = st.one_of(st.none(), st.booleans(), numbers, texts)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(texts, inner, max_size=5)),
    max_leaves=20,
)
payloads = st.dictionaries(texts, values, max_size=6)


def shown(value: Any) -> str:
    """Tells what `==` does not: 1 from 1.0 and True, -0.0 from 0.0."""
    if isinstance(value, dict):
        return "{" + ",".join(sorted(f"{k!a}:{shown(v)}" for k, v in value.items())) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(shown, value)) + "]"
    return ascii(value)


def nested(depth: int, leaf: Any = 1) -> dict[str, Any]:
    """A payload of this many containers inside one another, objects and lists in turn."""
    value = leaf
    for level in range(depth - 1):
        value = [value] if level % 2 else {"k": value}
    return {"k": value}


@pytest.mark.parametrize("kept", [b'{"data":{"n":' + b"1" * 5000 + b"}}", b"\xff", b'{"data":'])
def test_what_cannot_be_read_back_is_an_error_of_ours(kept: bytes) -> None:
    with pytest.raises(PersistenceError, match="^a stored payload cannot be read: "):
        payload.decode(b"{}", kept)


# --- On the servers -------------------------------------------------------------------------------


@settings(max_examples=100)
@given(batch=st.lists(st.tuples(payloads, texts), min_size=1, max_size=8))
@example(batch=[({text: text}, text) for text in TRICKY])
def test_every_payload_and_path_comes_back_exactly(
    store: BaseStore, batch: list[tuple[dict[str, Any], str]]
) -> None:
    events = [
        event(timestamp=T0 + i, data=data, working_directory=path)
        for i, (data, path) in enumerate(batch)
    ]
    single, rest = events[0], events[1:]
    assert store.save_event(single) is True
    assert store.save_events(rest) == len(rest)
    for sent in events:
        got = store.get_event_by_id("s", sent.id)
        assert got == sent
        assert got is not None
        assert shown(got.data) == shown(sent.data)


def test_tricky_texts_come_back_by_every_way_in(store: BaseStore) -> None:
    events = [event("s", T0 + i, data={t: {"k": [t]}}) for i, t in enumerate(TRICKY)]
    for one in events:
        store.save_event(one)
    more = [event("t", T0 + i, data={t: {"k": [t]}}) for i, t in enumerate(TRICKY)]
    store.save_events(more)
    assert store.get_events("s") == events
    assert store.get_events("t") == more


@pytest.mark.parametrize("depth", [30, 64, 65, 100, 101, 254, 255, 500, payload.MAX_DEPTH])
@pytest.mark.parametrize("leaf", [1, "\0", 2**70])
def test_deep_payloads_come_back(store: BaseStore, depth: int, leaf: Any) -> None:
    one = event(data=nested(depth, leaf))
    other = event(data=nested(depth, leaf))
    store.save_event(one)
    store.save_events([other])
    assert store.get_events("s") == [one, other]


LARGE = {
    "text": {"text": "é" * 2_000_000},
    "numbers that grow in MySQL": {"numbers": [1e14] * 600_000},
    "small numbers": {"numbers": [1] * 800_000},
    "many keys": {f"key {i}": {"value": i} for i in range(100_000)},
    "quotes": {"quotes": "'\\\"" * 500_000},
    "a long key": {"k" * 70_000: 1},
    "just under a megabyte": {"x": "y" * (2**20 - 100)},
    "a megabyte of NULs": {"x": "\0" * 2**20},
}


@pytest.mark.parametrize("name", LARGE)
def test_large_payloads_come_back(store: BaseStore, name: str) -> None:
    one, other = event(data=LARGE[name]), event(data=LARGE[name])
    store.save_event(one)
    store.save_events([other])
    assert store.get_events("s") == [one, other]


def test_the_largest_payload_is_kept_and_one_byte_more_is_refused(store: BaseStore) -> None:
    room = payload.MAX_PAYLOAD_BYTES - len(orjson.dumps({"x": ""}))
    largest = event(data={"x": "'" * room})
    store.save_event(largest)
    assert store.save_events([event("t", data=largest.data)]) == 1
    assert store.get_events("s") == [largest]
    with pytest.raises(InvalidRecord, match="^data: 16,777,217 bytes of JSON"):
        store.save_event(event(data={"x": "'" * (room + 1)}))


def test_a_payload_that_is_too_large_leaves_the_rest_of_its_batch(store: BaseStore) -> None:
    good = [event(timestamp=T0 + i, data={"x": "y" * 1_000_000}) for i in range(30)]
    batch = [*good, event(data={"x": "y" * 17 * 2**20})]
    with pytest.raises(InvalidBatch):
        store.save_events(batch)
    result = store.save_events(batch, on_error="skip")
    assert result.stored == 30
    assert [r.index for r in result.refused] == [30]
    assert list(store.iter_events()) == good


def test_the_queryable_column_holds_the_closest_projection(store: BaseStore, database: Any) -> None:
    store.save_event(event(data={"n": "a\0b", "i": 10**30, "toolName": "T"}))
    [row] = database.execute("SELECT data FROM events WHERE exact IS NOT NULL")
    column = row[0] if isinstance(row[0], dict) else json.loads(row[0])
    assert float(column.pop("i")) == 1e30  # jsonb writes it out as an integer
    assert column == {"n": "a\ufffdb", "toolName": "T"}


def test_plain_payloads_have_no_sidecar(store: BaseStore, database: Any) -> None:
    store.save_event(event(data={"a": ["\\u0000", 1.5, -(2**63), None, True, {"é": "😀"}]}))
    assert database.execute("SELECT COUNT(*) FROM events WHERE exact IS NOT NULL") == [(0,)]


# --- The encoder ----------------------------------------------------------------------------------


@given(data=payloads, path=texts)
def test_encoding_is_exact_and_the_column_always_valid_json(
    data: dict[str, Any], path: str
) -> None:
    encoded = payload.encode(data, path)
    got, got_path = payload.decode(encoded.json, encoded.exact, payload.column_text(path))
    assert shown(got) == shown(data)
    assert got_path == path
    projection = orjson.loads(encoded.json)
    assert isinstance(projection, dict)
    encoded.json.decode("utf-8")


class Level(IntEnum):
    HIGH = 3


class Word(str):
    __slots__ = ()


def test_subclasses_of_json_types_are_kept_as_their_plain_values() -> None:
    data = {"d": OrderedDict(a=1), "i": Level.HIGH, "s": Word("w"), "l": [Word("x\0")]}
    encoded = payload.encode(data)
    assert payload.decode(*encoded)[0] == {"d": {"a": 1}, "i": 3, "s": "w", "l": ["x\0"]}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, "data.a.b[1]: JSON has no nan"),
        (-math.inf, "data.a.b[1]: JSON has no -inf"),
        ((1, 2), "data.a.b[1]: JSON has no tuple (make it a list)"),
        (b"x", "data.a.b[1]: JSON has no bytes"),
        ({1}, "data.a.b[1]: JSON has no set"),
        (Decimal(1), "data.a.b[1]: JSON has no Decimal"),
        ({7: 1}, "data.a.b[1]: the key 7 is not a string"),
        ({None: 1}, "data.a.b[1]: the key None is not a string"),
        ({"n": None, None: 1}, "data.a.b[1]: the key None is not a string"),
    ],
)
def test_what_json_does_not_have_is_refused_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(InvalidRecord) as caught:
        payload.encode({"a": {"b": [0, value]}})
    assert str(caught.value) == message


def test_a_payload_that_holds_itself_twice_is_refused_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(payload, "MAX_PAYLOAD_BYTES", 2**20)  # at 16 MiB it takes 3 s
    cycle: dict[str, Any] = {}
    cycle["a"] = cycle["b"] = cycle
    with pytest.raises(InvalidRecord, match="^data: more values than a payload may have"):
        payload.encode(cycle)


def from_a_deep_stack(call: Callable[[], Any], frames: int = 500) -> Any:
    return from_a_deep_stack(call, frames - 1) if frames else call()


@pytest.mark.parametrize("leaf", ["needle", "\0", 2**70])
def test_a_deep_payload_is_exact_also_for_a_caller_with_a_deep_stack(
    store: BaseStore, leaf: Any
) -> None:
    one, other = (event("s", T0 + i, data=nested(payload.MAX_DEPTH, leaf)) for i in range(2))
    assert from_a_deep_stack(lambda: store.save_event(one)) is True
    assert from_a_deep_stack(lambda: store.save_events([other], on_error="skip").stored) == 1
    [got, _] = from_a_deep_stack(lambda: store.get_events("s"))
    assert got.data == one.data
    search = partial(store.find_events, session_id="s", contains=one.data, newest_first=False)
    assert [found.id for found in from_a_deep_stack(search)] == [one.id, other.id]


def test_what_goes_into_the_column_is_the_same_for_a_caller_with_a_deep_stack() -> None:
    data = nested(payload.MAX_DEPTH, "\0") | {"beside": nested(60, "\0")}
    encoded = payload.encode(data)
    for frames in range(500, 900, 20):
        assert from_a_deep_stack(lambda: payload.encode(data), frames) == encoded


def test_a_caller_at_the_end_of_its_stack_is_not_told_that_the_payload_is_bad() -> None:
    data = nested(payload.MAX_DEPTH, "\0")
    for frames in range(900, sys.getrecursionlimit()):
        with suppress(RecursionError):
            from_a_deep_stack(lambda: payload.encode(data), frames)


def test_what_is_deeper_than_any_stack_is_an_error_of_ours() -> None:
    with pytest.raises(InvalidRecord, match="^data: cannot be kept: nested too deep"):
        payload.exact_json(nested(100_000))
    with pytest.raises(PersistenceError, match="^a stored payload cannot be read: nested too deep"):
        payload.decode(b"{}", b"[" * 100_000)


def test_deep_payloads_are_searched(store: BaseStore) -> None:
    one = event(data=nested(payload.MAX_DEPTH, "needle"))
    store.save_event(one)
    assert store.find_events(session_id="s", contains=one.data) == [one]
    other = nested(payload.MAX_DEPTH, "hay")
    assert store.find_events(session_id="s", contains=other) == []


def test_iteration_keeps_large_payloads_out_of_its_pages(store: BaseStore) -> None:
    small = [event("s", T0 + i) for i in range(200)]
    large = [event("s", T0 + 500 + i, data={"x": "y" * 1_500_000}) for i in range(5)]
    odd = [event("s", T0 + 600 + i, data={"x": "\0" * 10}) for i in range(5)]
    store.save_events([*small, *large, *odd])
    assert list(store.iter_events(session_id="s")) == [*small, *large, *odd]
    filters = {"session_id": "s"}
    rows = store._run(
        lambda connection: store._select_events(connection, filters, True, 20, large_later=True)
    )
    assert max(len(row[10] or b"") for row in rows) <= 65_536
    assert [row[11] is not None for row in rows[:10]] == [True] * 10


def test_too_deep_and_cyclic_payloads_are_refused() -> None:
    with pytest.raises(InvalidRecord, match="^data: nested more than 512 deep"):
        payload.encode(nested(payload.MAX_DEPTH + 1))
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    with pytest.raises(InvalidRecord, match="^data: nested more than 512 deep"):
        payload.encode(cycle)


def test_numbers_too_long_for_python_to_print_are_refused() -> None:
    with pytest.raises(InvalidRecord, match="^data: cannot be kept: Exceeds the limit"):
        payload.encode({"n": 10**5000})


@pytest.mark.parametrize("column", ["", "[]", "1", "{"])
def test_a_column_without_a_payload_is_an_error_not_an_empty_payload(column: str) -> None:
    with pytest.raises(PersistenceError, match="^a stored payload"):
        payload.decode(column, None)


def test_the_outline_of_a_large_payload_is_small() -> None:
    for data in LARGE.values():
        encoded = payload.encode(data)
        assert len(encoded.json) <= 2**20
        if encoded.exact is not None and len(encoded.exact) > 2**20:
            assert len(encoded.json) < 2**19


def test_a_mapping_that_says_otherwise_is_taken_for_what_it_holds() -> None:
    class Secretive(dict):  # type: ignore[type-arg]
        def values(self) -> Any:
            return []

    with pytest.raises(InvalidRecord, match="JSON has no nan"):
        payload.encode({"x": Secretive(y=float("nan"))})


def test_an_integer_that_python_itself_will_not_write_is_refused() -> None:
    with pytest.raises(InvalidRecord, match="^data: cannot be kept: "):
        payload.encode({"n": 10**5000})
