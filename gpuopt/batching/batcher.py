"""Triton's dynamic batcher as a discrete-event simulation.

What is modelled is what Triton's user guide says of its dynamic batcher, in the way in which its scheduler does it:

- Requests wait in one queue, in order. A batch is formed from its head: the largest preferred size that is there, else
  what is there, at most the largest batch. Without preferred sizes the largest batch is the preferred one.
- With a queue delay a batch that has no preferred size waits until its oldest request is that old, or until arrivals
  make it one.
- Batches are formed ahead: up to two for each instance wait for one, and the last of them takes up further requests
  until it has a preferred size. So, without a delay, a batch is closed at the first preferred size that it reaches.
  With a limit of the queue, by size or by time, a batch is formed only when an instance is idle.
- An instance that takes a batch takes the next one along if that has waited for longer than the delay and both fit.
- A request that finds the queue full is refused; one that waits for longer than its timeout is refused, or put behind
  all others, when the batcher looks at it.
- With ordered responses a response waits for those of all requests before it.

Every request is one sample, and all have the same shape. One priority level.

The loop is own code over plain lists: a general simulation library, simpy, takes two and a half times as long for the
simplest of these settings, and a search runs thousands of simulations (`benchmarks/batching.py --simulator` has both).
"""

from __future__ import annotations

import collections
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_PREFETCHED = 2
"""Batches that are formed ahead for each instance."""

_LONGEST_SLEEP = 0.5
"""Seconds after which the batcher looks at its queue although nothing woke it."""

QUANTILES = 256
_NEVER = float("inf")


@dataclass(frozen=True)
class Settings:
    """The batcher's settings, by the names of `config.pbtxt`; 0: none."""

    max_batch_size: int
    preferred_batch_size: tuple[int, ...] = ()
    max_queue_delay_microseconds: int = 0
    instances: int = 1
    preserve_ordering: bool = False
    max_queue_size: int = 0
    queue_timeout_microseconds: int = 0
    timeout_action: Literal["REJECT", "DELAY"] = "REJECT"


@dataclass(frozen=True)
class Service:
    """How long an instance is busy with a batch.

    Attributes:
        seconds: shape (largest batch + 1, 256): row b has the time of a batch of b at 256 evenly spaced quantiles;
            row 0 means nothing.
        slowdown: factor on the time by the number of instances that are busy, itself included, from 1; further ones as
            the last.
        constant: seconds that every request takes besides, on its way in and out, while no instance is busy with it.
        after_idle: seconds that a batch takes longer if its instance had nothing to do before: wake-ups, cold caches,
            clocks.
    """

    seconds: Floats
    slowdown: tuple[float, ...] = (1.0,)
    constant: float = 0.0
    after_idle: float = 0.0

    @property
    def largest_batch(self) -> int:
        return len(self.seconds) - 1


@dataclass(frozen=True)
class Outcome:
    """What a load met.

    Attributes:
        latencies: seconds from arrival to response of the requests that were served, in order of service.
        refused: how many were not.
        seconds: from the first arrival to the last response.
        busy_seconds: of all instances together.
        batches: how many there were.
    """

    latencies: Floats
    refused: int
    seconds: float
    busy_seconds: float
    batches: int
    instances: int

    @property
    def throughput(self) -> float:
        """Served requests a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    @property
    def drop_rate(self) -> float:
        return self.refused / max(1, self.refused + len(self.latencies))

    @property
    def utilisation(self) -> float:
        return self.busy_seconds / (self.seconds * self.instances) if self.seconds else 0.0

    @property
    def mean_batch(self) -> float:
        return len(self.latencies) / max(1, self.batches)

    def percentile(self, percent: float) -> float:
        """Seconds that so many percent of the served requests took at most; infinity if none was served."""
        if not len(self.latencies):
            return _NEVER
        return float(np.percentile(self.latencies, percent, method="inverted_cdf"))


class _Payload:
    """A batch that is formed; `closed`: an instance has it, or it takes up nothing more."""

    __slots__ = ("closed", "oldest", "requests")

    def __init__(self) -> None:
        self.requests: list[int] = []
        self.oldest = _NEVER
        self.closed = False


def simulate(arrivals: Floats, service: Service, settings: Settings, seed: int = 0) -> Outcome:
    """Serve a load.

    Args:
        arrivals: seconds, ascending.
        service: for batches up to `settings.max_batch_size` at least.
        seed: of the draws from the service times.
    """
    run = _Run(arrivals.tolist(), service, settings, seed)
    run.go()
    return run.outcome()


class _Run:
    """One simulation. The names of the batcher's state are those of what they stand for in Triton's scheduler."""

    def __init__(self, arrivals: list[float], service: Service, settings: Settings, seed: int) -> None:
        self.arrivals = arrivals
        self.instances = settings.instances
        self.largest = settings.max_batch_size
        self.preferred = sorted(settings.preferred_batch_size or (settings.max_batch_size,))
        self.delay = settings.max_queue_delay_microseconds * 1e-6
        self.queue_limit = settings.max_queue_size or len(arrivals)
        self.timeout = settings.queue_timeout_microseconds * 1e-6 or _NEVER
        self.put_back = settings.timeout_action == "DELAY"
        self.ordered = settings.preserve_ordering
        # A queue that has to be watched is not emptied before an instance is idle.
        self.prefetches = not settings.max_queue_size and not settings.queue_timeout_microseconds
        self.slots = _PREFETCHED * settings.instances
        self.times: list[list[float]] = service.seconds.tolist()
        slowdown = list(service.slowdown)
        self.slowdown = [1.0, *slowdown, *([slowdown[-1]] * settings.instances)][: settings.instances + 1]
        self.constant, self.after_idle = service.constant, service.after_idle
        # As many draws as there can be batches; drawn at once.
        draws = np.random.default_rng(seed).integers(0, QUANTILES, min(len(arrivals), 1 << 16) + 1)
        self.draws: list[int] = draws.tolist()

        self.queue: collections.deque[int] = collections.deque()
        self.put_behind: collections.deque[int] = collections.deque()
        self.waiting: collections.deque[_Payload] = collections.deque()
        self.payload = _Payload()
        self.saturated = False
        self.pending = 0
        self.next_preferred = 0
        self.timer = _NEVER
        self.asleep = 0.0
        self.idle = settings.instances
        self.idle_since = [-_NEVER] * settings.instances
        self.finishing: list[float] = []

        self.served: list[int] = []
        self.sizes: list[int] = []
        self.finished: list[float] = []
        self.busy_seconds = 0.0
        self.refused = 0

    def go(self) -> None:
        arrivals, finishing, queue = self.arrivals, self.finishing, self.queue
        count, index = len(arrivals), 0
        now = 0.0
        while True:
            arrival = arrivals[index] if index < count else _NEVER
            finish = finishing[0] if finishing else _NEVER
            if arrival <= finish and arrival <= self.timer:
                if arrival == _NEVER:
                    return
                now = arrival
                if len(queue) + len(self.put_behind) >= self.queue_limit:
                    self.refused += 1
                else:
                    queue.append(index)
                    if self._has_slot() and (
                        self.saturated
                        or self.payload.closed
                        or len(queue) + len(self.put_behind) >= self.next_preferred
                    ):
                        self._form(now)
                    elif self.timer == _NEVER and self._has_slot():
                        self.timer = self.asleep + _LONGEST_SLEEP * math.ceil((now - self.asleep) / _LONGEST_SLEEP)
                index += 1
            elif finish <= self.timer:
                now = heapq.heappop(finishing)
                self.idle += 1
                self.idle_since.append(now)
                if self.waiting:
                    self._start(now)
                    self._form(now)
                elif not self.prefetches:
                    self._form(now)
            else:
                now = self.timer
                self._form(now)

    def _has_slot(self) -> bool:
        return len(self.waiting) < self.slots if self.prefetches else self.idle > 0

    def _form(self, now: float) -> None:
        """What the batcher does when it is woken, until it sleeps again."""
        queue, behind = self.queue, self.put_behind
        while True:
            payload = self.payload
            if self.saturated or payload.closed:
                payload = self.payload = _Payload()
                self.saturated = False
                self.next_preferred = 0
            if not queue and not behind:
                self.timer = _NEVER
                self.asleep = now
                return
            if not self._has_slot():
                self.timer = _NEVER
                return
            wait = self._choose(now, payload)
            if wait > 0:
                self.timer = now + wait
                return
            if self.pending:
                self._take(now, payload)

    def _choose(self, now: float, payload: _Payload) -> float:
        """Set `pending`, how many requests join the payload now; seconds to sleep first if that is not yet decided."""
        if self.timeout != _NEVER:
            self._expire(now)
        queued = len(self.queue) + len(self.put_behind)
        size, seen, preferred = len(payload.requests), min(self.pending, queued), self.preferred
        largest_preferred = preferred[-1]
        fitting = min(queued, self.largest - size)
        best = 0
        if fitting > seen or queued > seen:
            if size + seen >= largest_preferred:
                # The next one would go beyond all preferred sizes: what was seen before it is the best there is.
                best = seen or (1 if fitting > 1 else 0)
                self.saturated = self.saturated or size + seen > 0
            else:
                for wanted in preferred:
                    if size + seen < wanted <= size + fitting:
                        best = wanted - size
        full = fitting < queued and size + fitting > 0
        pending = max(fitting, seen)
        self.pending = pending
        oldest = self._oldest()
        exceeded = self.delay > 0 and now >= oldest + self.delay
        if best and not exceeded:
            if not self.delay:
                self.saturated = True
            self.pending = best
            return 0.0
        if not pending:
            self.saturated = self.saturated or full
            return 0.0
        if full or size + pending >= largest_preferred:
            self.saturated = True
            return 0.0
        if exceeded or not self.delay:
            return 0.0
        higher = next((wanted for wanted in preferred if wanted > size + pending), preferred[0])
        self.next_preferred = max(0, higher - size)
        if not self.saturated and size and size not in preferred:
            return 0.0
        expiry = self.arrivals[self.queue[0]] + self.timeout if self.queue else _NEVER
        return max(min(oldest + self.delay, expiry) - now, 1e-9)

    def _oldest(self) -> float:
        """Arrival of the oldest request that waits."""
        first = self.arrivals[self.queue[0]] if self.queue else _NEVER
        return min(first, self.arrivals[self.put_behind[0]]) if self.put_behind else first

    def _expire(self, now: float) -> None:
        queue = self.queue
        while queue and now - self.arrivals[queue[0]] > self.timeout:
            request = queue.popleft()
            if self.put_back:
                self.put_behind.append(request)
            else:
                self.refused += 1
            self.pending = 0

    def _take(self, now: float, payload: _Payload) -> None:
        """Move `pending` requests into the payload; a new one waits for an instance, or finds one."""
        is_new = not payload.requests
        queue = self.queue
        for _ in range(self.pending):
            request = queue.popleft() if queue else self.put_behind.popleft()
            payload.requests.append(request)
            payload.oldest = min(payload.oldest, self.arrivals[request])
        self.pending = 0
        if is_new:
            self.waiting.append(payload)
            if self.idle:
                self._start(now)

    def _start(self, now: float) -> None:
        """An idle instance takes the batch that waits longest, and what may be merged with it."""
        payload = self.waiting.popleft()
        payload.closed = True
        if self.delay:
            while self.waiting and now - self.waiting[0].oldest > self.delay:
                following = self.waiting[0]
                following.closed = True
                if len(payload.requests) + len(following.requests) > self.largest:
                    break
                payload.requests += following.requests
                self.waiting.popleft()
        size = len(payload.requests)
        self.idle -= 1
        draw = self.draws[len(self.sizes) % len(self.draws)]
        duration = self.times[size][draw] * self.slowdown[self.instances - self.idle]
        if self.idle_since.pop() < now:
            duration += self.after_idle
        heapq.heappush(self.finishing, now + duration)
        self.busy_seconds += duration
        self.served += payload.requests
        self.sizes.append(size)
        self.finished.append(now + duration)

    def outcome(self) -> Outcome:
        arrivals = np.asarray(self.arrivals)
        finished = np.repeat(np.asarray(self.finished, np.float64), np.asarray(self.sizes, np.int64))
        if self.ordered:
            finished = np.maximum.accumulate(finished) if len(finished) else finished
        order = np.asarray(self.served, np.int64)
        latencies = finished - arrivals[order] + self.constant
        span = float(finished.max() - arrivals[0]) if len(finished) else 0.0
        return Outcome(latencies, self.refused, span, self.busy_seconds, len(self.sizes), self.instances)


def constant_service(seconds: Sequence[float]) -> Service:
    """Service times without spread: `seconds[b - 1]` for a batch of b."""
    rows = np.repeat(np.asarray([0.0, *seconds], np.float64)[:, None], QUANTILES, axis=1)
    return Service(rows)
