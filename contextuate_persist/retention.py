"""Retention: which sessions may go, their deletion in small steps, and the valve for a full disk.

Which are due is decided here, from what the store tells of every session; there is no SQL.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, TypeAlias, TypeVar

from contextuate_persist import model, trees
from contextuate_persist.errors import (
    ConfigurationError,
    PersistenceError,
    StorageFull,
    StoreRefused,
)
from contextuate_persist.partitions import Dropped
from contextuate_persist.records import Due, SessionState, Weight

if TYPE_CHECKING:
    from contextuate_persist.base import BaseStore

log = logging.getLogger(__name__)

#: Called with the sessions done and the sessions in all.
Progress: TypeAlias = Callable[[int, "int | None"], None]
#: Sessions that hang together, all of them.
Tree: TypeAlias = tuple[SessionState, ...]
T = TypeVar("T")

DAY = 86_400_000
#: Without any limit of another kind, sessions go when they are this old.
DEFAULT_DAYS = 90.0

# Of one transaction, unless a single tree has more: long enough to be worth a commit, short enough
# that a writer who waits for the disk, or for a lock, waits for a moment only.
STEP_EVENTS = 1_000
STEP_SESSIONS = 50
# Weighing reads what goes from the disk: so much at once that it is no burst of its own.
_WEIGHED_EVENTS, _WEIGHED_SESSIONS = 2_000, 200
#: So many times as long as a step took, what deletes for long rests after it. What it deletes comes
#: from the disk, and every commit behind it waits for that: with PostgreSQL's 18 million events the
#: p95 of writers rose to 1.7 times with it, to 2.0 with 5, 2.6 with 3 and 3.9 with 1 (steps of
#: 2,000: 1.8, then 3.3 with 3 and 5.0 with 1); to 1.1 since weighing is a part of a step. A day's
#: 50,000 events still go within a minute.
REST = 10.0
# After one large tree writers have long recovered.
_LONGEST_REST_SECONDS = 60.0
# Of the valve: it has to be faster than what fills the database.
_REST_WHEN_FULL = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """What is kept: each limit that is given has to hold, and pinned sessions always stay.

    Without any limit it is an age of `DEFAULT_DAYS`.

    A tree, linked by effective parents, goes only as a whole, and counts as active as long as its
    last member. Of `max_age_days`, a tree is due when it was active before. Of `max_sessions` and
    `max_bytes`, the trees that were active longest ago go until the rest fits; pinned sessions
    count, and those that are merely referred to do not. Bytes are those of
    `BaseStore.weigh_sessions`: what the events of sessions take, not what files have on a disk.
    What was active, or got an event, within `spared_days` stays in any case, so that no limit takes
    what still runs. Active is a session until its end, without one until its last event.
    """

    max_age_days: float | None = None
    max_sessions: int | None = None
    max_bytes: int | None = None
    spared_days: float = 1.0

    def __post_init__(self) -> None:
        if self.max_age_days is self.max_sessions is self.max_bytes is None:
            object.__setattr__(self, "max_age_days", DEFAULT_DAYS)
        for name in ("max_age_days", "spared_days", "max_sessions", "max_bytes"):
            value = getattr(self, name)
            whole = name in ("max_sessions", "max_bytes")
            kinds = (int,) if whole else (int, float)
            if value is None and name != "spared_days":
                continue
            if type(value) not in kinds or not 0 <= value <= model.MAX_COUNT:
                what = "a count" if whole else "a number of days"
                raise ConfigurationError(f"{name}: {what} is needed, not {model.shown(value)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPlan:
    """What is due by a policy, the trees that were active longest ago first."""

    trees: tuple[Tree, ...]
    sessions: int
    """How many sessions these have, mere references not among them."""
    kept: int
    """How many sessions stay."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneReport:
    """What a pruning did, or with a dry run would do.

    `spared` are sessions that were due, and are left since something of their tree changed
    meanwhile: the next pruning sees to them. `size` is in bytes, as a policy counts them; what went
    with a whole partition of events is counted in neither `events` nor `size`.
    """

    sessions: int
    events: int
    size: int
    spared: int
    kept: int


def plan(store: BaseStore, policy: RetentionPolicy, *, now: int | None = None) -> RetentionPlan:
    """What is due now. Reads every session, and for `max_bytes` the sizes of what may stay."""
    now = _now(store) if now is None else now
    states = {state.session_id: state for state in store.session_states()}
    links = {state.session_id: state.parent_id for state in states.values()}
    forest = [tuple(states[one] for one in tree) for tree in trees.linked_groups(links)]
    forest.sort(key=_last_active)
    spared = now - policy.spared_days * DAY
    free = [tree for tree in forest if _last_seen(tree) < spared and not _pinned(tree)]
    count = 0
    if policy.max_age_days is not None:
        oldest = now - policy.max_age_days * DAY
        count = sum(_last_active(tree) < oldest for tree in free)
    if policy.max_sessions is not None:
        excess = sum(map(shown, forest)) - policy.max_sessions
        count = max(count, _first_that_make(excess, map(shown, free)))
    if policy.max_bytes is not None:
        count = max(count, _over_bytes(store, policy.max_bytes, forest, free))
    due = tuple(free[:count])
    gone = sum(map(shown, due))
    return RetentionPlan(trees=due, sessions=gone, kept=sum(map(shown, forest)) - gone)


def prunable(
    states: Iterable[SessionState], due: Due, *, held: Collection[str] = ()
) -> dict[str, str | None]:
    """The sessions of which the whole tree is due, by id, with their effective parents.

    What is `held` keeps its tree and those that it is the parent of.
    """
    parents: dict[str, str | None] = {}
    free: set[str] = set()
    for state in states:
        parents[state.session_id] = state.parent_id
        if due.takes(state) and state.session_id not in held and state.parent_id not in held:
            free.add(state.session_id)
    groups = trees.linked_groups(parents)
    return {one: parents[one] for tree in groups if free.issuperset(tree) for one in tree}


def _now(store: BaseStore) -> int:
    """The earlier of this machine's time and the server's: one that is ahead deletes too much."""
    return min(time.time_ns() // 1_000_000, store.clock())


def _last_active(tree: Tree) -> int:
    return max(state.last_active for state in tree)


def _last_seen(tree: Tree) -> int:
    return max(max(state.last_active, state.last_event or 0) for state in tree)


def _pinned(tree: Tree) -> bool:
    return any(state.is_pinned for state in tree)


def left_words(changed: int) -> str:
    """What a report says, behind a comma, of sessions that changed meanwhile."""
    return f", {changed:,} changed meanwhile and are left for the next time" if changed else ""


def shown(tree: Tree) -> int:
    """How many sessions of a tree count: mere references do not."""
    return sum(state.is_shown for state in tree)


def _first_that_make(excess: int, sizes: Iterator[int]) -> int:
    """How many trees from the first on must go, so that so much goes."""
    count = 0
    for size in sizes:
        if excess <= 0:
            break
        excess -= size
        count += 1
    return count


def _over_bytes(store: BaseStore, limit: int, forest: Sequence[Tree], free: Sequence[Tree]) -> int:
    """How many of the trees that may go must, weighing only what stays and one tree more."""
    if store.size() <= limit:  # with its indexes and all that is free in it: nothing to weigh
        return 0
    may_go = {tree[0].session_id for tree in free}
    fixed = [tree for tree in forest if tree[0].session_id not in may_go]
    room = limit - sum(weight.size for _, weight in weighed(store, fixed))
    for count, (_, weight) in enumerate(weighed(store, free[::-1])):
        room -= weight.size
        if room < 0:
            return len(free) - count
    return 0


def weighed(store: BaseStore, given: Sequence[Tree]) -> Iterator[tuple[Tree, Weight]]:
    """Trees with their weights, asked for some at a time: by what the ones before them had."""
    some: list[Tree] = []
    sessions, at_once = 0, 1
    for position, tree in enumerate(given, start=1):
        some.append(tree)
        sessions += len(tree)
        if sessions >= at_once or position == len(given):
            weights = store.weigh_sessions([state.session_id for one in some for state in one])
            for one in some:
                yield one, _sum(weights, one)
            events = sum(weight.events for weight in weights.values())
            fitting = sessions * _WEIGHED_EVENTS // max(1, events)
            at_once = max(1, min(fitting, 2 * at_once, _WEIGHED_SESSIONS))
            some, sessions = [], 0


def _sum(weights: Mapping[str, Weight], tree: Tree) -> Weight:
    own = [weights[state.session_id] for state in tree]
    return Weight(sum(weight.events for weight in own), sum(weight.size for weight in own))


def prune(
    store: BaseStore,
    policy: RetentionPolicy,
    *,
    dry_run: bool = False,
    rest: float = REST,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
) -> PruneReport:
    """Delete what is due, in transactions of a thousand events; or with `dry_run` nothing.

    Between two transactions it rests `rest` times as long as the first took, a minute at most, so
    that writers come through. May be killed, or told to `stop`, at any moment: what is left, the
    next pruning does. A tree is spared in which a session, after it was found due, is pinned, gets
    another end, a later event, another parent or a child, or is deleted. Raises what the store's
    calls raise.
    """
    dropped = 0 if dry_run else drop_partitions(store, policy).sessions
    found = plan(store, policy)
    if dry_run:
        total = [weight for _, weight in weighed(store, found.trees)]
        return PruneReport(
            sessions=found.sessions,
            events=sum(weight.events for weight in total),
            size=sum(weight.size for weight in total),
            spared=0,
            kept=found.kept,
        )
    done = events = size = 0
    sessions = 0
    for step in Pace(rest, stop).steps(steps(weighed(store, found.trees))):
        states = [state for tree, _ in step for state in tree]
        gone = set(store.delete_unchanged(states))
        for tree, weight in step:
            done += shown(tree)
            if tree[0].session_id in gone:
                sessions += shown(tree)
                events += weight.events
                size += weight.size
        if progress is not None:
            progress(done, found.sessions)
    store.forget_old_deletions()
    return PruneReport(
        sessions=dropped + sessions,
        events=events,
        size=size,
        spared=done - sessions,
        kept=found.kept + found.sessions - sessions,
    )


class Pace:
    """Makes work that comes in steps leave room to others."""

    def __init__(self, rest: float, stop: threading.Event | None = None) -> None:
        """Rest `rest` times as long as a step took before the next one, and end when told to."""
        self._rest = rest
        self._stop = stop or threading.Event()
        self._until = 0.0

    def goes_on(self) -> bool:
        """Wait until the rest after the last step is over; whether there may be another one."""
        return not self._stop.wait(max(0.0, self._until - time.monotonic()))

    def steps(self, given: Iterable[T]) -> Iterator[T]:
        """The steps as they are due; the time to find the next one is a part of each."""
        begun = time.monotonic()
        for step in given:
            self._has_worked(begun)
            if not self.goes_on():
                return
            begun = time.monotonic()
            yield step
            self._has_worked(begun)
            if self._stop.is_set():
                return

    def _has_worked(self, begun: float) -> None:
        now = time.monotonic()
        rest = min(self._rest * (now - begun), _LONGEST_REST_SECONDS)
        self._until = max(self._until, now + rest)


def drop_partitions(store: BaseStore, policy: RetentionPolicy, *, empty: bool = False) -> Dropped:
    """Drop whole partitions of what is due by age, where there are any; or those that are `empty`.

    It is the owner's to do: with another account the sessions in them go one by one.
    """
    nothing = Dropped((), {}, 0, 0.0)
    if policy.max_age_days is None or store.health().schema_layout != "partitioned":
        return nothing
    now = _now(store)
    quiet_since = now - round(policy.spared_days * DAY)
    older_than = min(now - round(policy.max_age_days * DAY), quiet_since)
    if older_than < model.MIN_TIMESTAMP:
        return nothing
    try:
        return store.drop_partitions(older_than, quiet_since=quiet_since, empty=empty)
    except StoreRefused as error:
        log.info("partitions are not dropped: %s", error)
        return nothing


def steps(given: Iterable[tuple[Tree, Weight]]) -> Iterator[list[tuple[Tree, Weight]]]:
    """Trees for one transaction each time: a few small ones, or one that is large."""
    return batches(given, STEP_SESSIONS, STEP_EVENTS, lambda weight: weight.events)


def batches(
    given: Iterable[tuple[Tree, Weight]],
    most_sessions: int,
    most: int,
    measure: Callable[[Weight], int],
) -> Iterator[list[tuple[Tree, Weight]]]:
    """Trees in batches of so many sessions and of so much at most, unless a single one has more."""
    batch: list[tuple[Tree, Weight]] = []
    sessions = amount = 0
    for tree, weight in given:
        size = measure(weight)
        if batch and (sessions + len(tree) > most_sessions or amount + size > most):
            yield batch
            batch, sessions, amount = [], 0, 0
        batch.append((tree, weight))
        sessions += len(tree)
        amount += size
    if batch:
        yield batch


# --- The valve ------------------------------------------------------------------------------------

#: At least so many seconds lie between two looks at the size of the database.
CHECK_SECONDS = 30.0
# Once full, it is full until it is down to this part of the limit.
LOW = 0.9
# Of the time, a store spends no more than this part on looking and making room.
_PART_OF_TIME = 0.05
_CLOSE_SECONDS = 5.0

OnFull: TypeAlias = Literal["warn", "prune", "refuse"]


class Valve:
    """Looks now and then how large a database is, and at its limit does what the operator chose.

    `pass_through`, which every call that stores something begins with, compares two numbers; a
    look is taken in a thread of its own, at most every CHECK_SECONDS and only while something is
    stored. That is one query, for the size of the tables by the server's catalogue. Only where this
    is over the limit, in which what deleting has left free counts, are events weighed, one query
    for each 200 sessions: then the smaller number is what is used.
    """

    def __init__(
        self, store: BaseStore, limit: int, on_full: OnFull, policy: RetentionPolicy | None
    ) -> None:
        """Raises ConfigurationError for a limit or a word that is none."""
        if type(limit) is not int or not 0 < limit <= model.MAX_COUNT:
            raise ConfigurationError(
                f"storage_limit: a number of bytes is needed, not {model.shown(limit)}"
            )
        if on_full not in ("warn", "prune", "refuse"):
            raise ConfigurationError(
                f"on_full: 'warn', 'prune' or 'refuse' is needed, not {model.shown(on_full)}"
            )
        self._store = store
        self._limit = limit
        self._low = int(limit * LOW)
        self._on_full = on_full
        size = self._low
        if policy is not None and policy.max_bytes is not None:
            size = min(size, policy.max_bytes)
        self._policy = RetentionPolicy(max_bytes=size)
        if policy is not None:
            self._policy = replace(policy, max_bytes=size)
        self._used = 0
        self._blind = False  # and has said so
        self.full = False
        self.reset()

    def reset(self) -> None:
        """Begin anew: when the store opens, and in a forked child, which has no thread."""
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._due = 0.0

    def pass_through(self) -> None:
        """Let a call store something; raises StorageFull if that is what was chosen."""
        if time.monotonic() >= self._due:
            self._look()
        if self.full and self._on_full == "refuse":
            raise StorageFull(
                f"the database takes {self._used:,} bytes, and storage_limit is {self._limit:,}: "
                f"make room with `contextuate-persist prune --bytes {self._low}`, or `archive`, "
                f"or raise storage_limit"
            )

    def _look(self) -> None:
        with self._lock:
            if time.monotonic() < self._due or self._stop.is_set():
                return
            self._due = float("inf")  # until this look is over
            self._thread = threading.Thread(target=self._run, daemon=True)
            try:
                self._thread.start()
            except RuntimeError:  # no thread can be had
                self._thread = None
                self._due = time.monotonic() + CHECK_SECONDS

    def _run(self) -> None:
        begun = time.monotonic()
        try:
            self.check()
        except PersistenceError as error:  # the next look may find the database back
            log.log(
                logging.DEBUG if self._blind else logging.WARNING,
                "storage_limit is not watched over: %s",
                error,
            )
            self._blind = True
        else:
            self._blind = False
        finally:
            now = time.monotonic()
            self._due = now + max(CHECK_SECONDS, (now - begun) / _PART_OF_TIME)

    def check(self) -> None:
        """Look now, and do at once what is to be done."""
        self._measure()
        if self.full and self._on_full == "prune":
            report = prune(self._store, self._policy, rest=_REST_WHEN_FULL, stop=self._stop)
            log.warning("%d sessions were deleted to make room", report.sessions)
            self._measure()

    def _measure(self) -> None:
        used = self._store.size()
        if used > (self._low if self.full else self._limit):
            ids = [state.session_id for state in self._store.session_states()]
            parts = (
                ids[at : at + _WEIGHED_SESSIONS] for at in range(0, len(ids), _WEIGHED_SESSIONS)
            )
            weights = (w for part in parts for w in self._store.weigh_sessions(part).values())
            used = min(used, sum(weight.size for weight in weights))
        self._used = used
        if not self.full and used > self._limit:
            self.full = True
            log.warning("the database takes %d bytes, over its limit of %d", used, self._limit)
        elif self.full and used <= self._low:
            self.full = False
            log.info("the database takes %d bytes, within its limit again", used)

    def close(self) -> None:
        """Look no more; what is under way ends with its transaction."""
        self._stop.set()
        if (thread := self._thread) is not None:
            thread.join(_CLOSE_SECONDS)
