"""Which keys of a stage wait, which are given out, and which have failed for good. No Ray, no processes.

The one idea: a key may be given out any number of times, and the first result counts, because every worker writes the
same bytes. What must not happen is that a key is forgotten, that one is tried for ever, or that a worker which fails
at everything uses up the tries of all keys: a key goes to a worker that has not had it, as long as there is one.
"""

from collections import Counter, deque
from collections.abc import Hashable, Iterable
from typing import Any

TRIES = 3
"""How often the work on a key may fail, or take its worker with it, before the key counts as failed."""


class Assignment:
    """The keys of a stage between its workers, which are known by numbers."""

    def __init__(self, keys: Iterable[Hashable]) -> None:
        self._unfinished: dict[Any, None] = dict.fromkeys(keys)
        self._waiting = deque(self._unfinished)
        self._tries: Counter[Any] = Counter()
        self._given: dict[Any, set[int]] = {}
        self.failures: dict[Any, BaseException] = {}
        """The keys that failed for good, with what the last try raised."""

    @property
    def over(self) -> bool:
        """Whether every key is finished or has failed for good."""
        return len(self.failures) == len(self._unfinished)

    @property
    def left(self) -> int:
        """Keys that are neither finished nor failed."""
        return len(self._unfinished) - len(self.failures)

    @property
    def waiting(self) -> int:
        """Keys that no worker has; copies of keys that one has are counted too."""
        return len(self._waiting)

    def is_open(self, key: Hashable) -> bool:
        """Whether a result of the key would still be news."""
        return key in self._unfinished

    def copies(self, key: Hashable) -> int:
        """How many workers have been given the key so far."""
        return len(self._given.get(key, ()))

    def take(self, worker: int, others: Iterable[int]) -> Any:
        """The next key for a worker, or None; a key that it has had is left to the others while there are any."""
        rest = set(others) - {worker}
        for _ in range(len(self._waiting)):
            key = self._waiting.popleft()
            if key not in self._unfinished or key in self.failures:
                continue
            had = self._given.setdefault(key, set())
            if worker in had and rest - had:
                self._waiting.append(key)
                continue
            had.add(worker)
            return key
        return None

    def finish(self, key: Hashable) -> bool:
        """Note a result; whether it is the first one of the key."""
        if key not in self._unfinished:
            return False
        del self._unfinished[key]
        self.failures.pop(key, None)
        return True

    def give_back(self, key: Hashable) -> None:
        """Let the key wait again: its worker went away through no fault of the key, or takes too long with it."""
        if key in self._unfinished and key not in self.failures and key not in self._waiting:
            self._waiting.appendleft(key)

    def fail(self, key: Hashable, error: BaseException, *, for_good: bool = False) -> None:
        """Note a failed try: the key waits again, or has failed for good if so told or at the last try."""
        if key not in self._unfinished:
            return
        self._tries[key] += 1
        if for_good or self._tries[key] >= TRIES:
            self.failures[key] = error
        elif key not in self._waiting:
            self._waiting.append(key)
