"""Timing: things in turns, medians over repetitions, percentiles of single calls."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """What a ratio is compared with."""

    limit: float
    at_least: bool  # else at most

    def met(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One measured line; with a goal its value must keep to that."""

    backend: str
    chapter: str
    name: str
    value: float
    unit: str
    goal: Goal | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.goal is None:
            return ""
        return "met" if self.goal.met(self.value) else "MISSED"


@dataclass(slots=True)
class Latency:
    """Times of single calls, in ms."""

    times: list[float] = field(default_factory=list)

    def time(self, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        self.times.append((time.perf_counter() - start) * 1000)

    def percentile(self, percent: float) -> float:
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

    @property
    def p50(self) -> float:
        return self.percentile(50)

    @property
    def p95(self) -> float:
        return self.percentile(95)

    @property
    def p99(self) -> float:
        return self.percentile(99)

    def __str__(self) -> str:
        return f"p50 {self.p50:.3f}, p95 {self.p95:.3f}, p99 {self.p99:.3f} ms"


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rates(
    contenders: Mapping[str, Callable[[int], object]],
    *,
    rounds: int,
    events: int,
    warm_up: int = 0,
) -> dict[str, float]:
    """Events per second of each contender: the median of rounds that are taken in turns.

    A contender is called with the number of the round and stores `events` events; the first
    rounds, `warm_up` before the `rounds`, do not count. Whoever comes first in a round comes last
    in the next, so that nobody always follows the same neighbour.
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(warm_up + rounds):
        for name in names if number % 2 == 0 else reversed(names):
            rate = events / seconds(lambda n=name, r=number: contenders[n](r))  # type: ignore[misc]
            if number >= warm_up:
                taken[name].append(rate)
    return {name: statistics.median(values) for name, values in taken.items()}


def latencies(
    contenders: Mapping[str, Callable[[int], object]], *, calls: int, warm_up: int = 10
) -> dict[str, Latency]:
    """The time of each single call, the contenders in turns; the first calls do not count."""
    found = {name: Latency() for name in contenders}
    for number in range(warm_up + calls):
        for name, call in contenders.items():
            if number < warm_up:
                call(number)
            else:
                found[name].time(lambda c=call, n=number: c(n))  # type: ignore[misc]
    return found


@dataclass(frozen=True, slots=True)
class Crowd:
    """What threads that call at the same time reached together."""

    rate: float  # calls per second
    latency: Latency
    errors: list[BaseException]
    calls: list[int]  # of each thread


def crowd(threads: int, duration: float, call: Callable[[int, int], object]) -> Crowd:
    """Call from many threads for so many seconds: `call(thread, number)`."""
    latency = [Latency() for _ in range(threads)]
    errors: list[BaseException] = []
    ready = threading.Barrier(threads + 1)
    end = [0.0]

    def run(thread: int) -> None:
        ready.wait()
        number = 0
        try:
            while time.perf_counter() < end[0]:
                latency[thread].time(partial(call, thread, number))
                number += 1
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(thread,)) for thread in range(threads)]
    for worker in workers:
        worker.start()
    start = time.perf_counter()
    end[0] = start + duration
    ready.wait()
    for worker in workers:
        worker.join()
    taken = time.perf_counter() - start
    times = [value for one in latency for value in one.times]
    return Crowd(len(times) / taken, Latency(times), errors, [len(one.times) for one in latency])


def batches(items: list[T], size: int) -> Iterator[list[T]]:
    """The items in lists of this size."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def batches_of(items: Iterator[T], size: int) -> Iterator[list[T]]:
    """The same of items that are made when they are needed."""
    while batch := list(itertools.islice(items, size)):
        yield batch
