"""What a command tells while it runs: bars on a terminal, plain lines in the log of a job, and a summary at the end.

It knows nothing but the events of stages.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ray_tracin.stages import Event, Listener

PLAIN_LINE_SECONDS = 5.0
SILENT_SECONDS = 30.0
"""After which a stage that has told nothing new is told of all the same: the first key of a stage can take minutes."""


@dataclass
class _Told:
    """What has been told of a stage."""

    began: float
    """Seconds of earlier parts included."""
    part_began: float
    before: int
    printed: float
    computed: int = 0
    again: int = 0
    ended: float | None = None
    last: Event | None = None


@contextmanager
def progress(console: Console) -> Iterator[Listener]:
    """A listener that shows what it is told; the summary follows when the context ends, whichever way."""
    lines = PlainLines(console)
    try:
        if console.is_terminal:
            with _bars(console) as show:
                yield lambda event: (lines.count(event), show(event))[1]
        else:
            with _reminded(lines):
                yield lines
    finally:
        lines.summarise()


@contextmanager
def _reminded(lines: "PlainLines") -> Iterator[None]:
    ended = threading.Event()

    def remind() -> None:
        while not ended.wait(PLAIN_LINE_SECONDS):
            lines.remind()

    thread = threading.Thread(target=remind, daemon=True, name="progress")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextmanager
def _bars(console: Console) -> Iterator[Listener]:
    columns = (TextColumn("{task.description:>16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        tasks: dict[str, int] = {}

        def listen(event: Event) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total)
            bars.update(tasks[event.stage], completed=event.done, total=event.total)  # type: ignore[arg-type]

        yield listen


class PlainLines:
    """Prints the beginning and end of a stage, every attempt in vain, and a line every few seconds in between."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stages: dict[str, _Told] = {}
        self._started = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Note the event, and print a line if it is time."""
        told = self.count(event)
        now = time.monotonic()
        if event.kind == "begin" or (event.kind == "done" and now - told.printed < PLAIN_LINE_SECONDS):
            return
        told.printed = now
        if event.kind == "again":
            self._print(f"{event.stage}: an attempt at {event.key} came to nothing, {event.detail}")
            return
        fresh, spent, spent_on_part = event.done - told.before, now - told.began, now - told.part_began
        left = ""
        if event.kind == "done" and fresh and spent_on_part:
            rate = fresh / spent_on_part
            left = f", {60 * rate:.1f} keys a minute, about {(event.total - event.done) / rate:.0f} s left"
        again = f", {told.again} in vain" if told.again else ""
        self._print(f"{event.stage}: {event.done}/{event.total} in {spent:.1f} s{left}{again} {event.detail}".rstrip())

    def count(self, event: Event) -> _Told:
        """Note the event without a line."""
        now = time.monotonic()
        if event.stage not in self._stages or event.kind == "begin":
            earlier = self._stages.get(event.stage)
            told = _Told(now, now, event.done, now)
            if earlier is not None:  # A stage of several parts, such as gradients that are freed between checkpoints.
                told.began -= (earlier.ended or now) - earlier.began
                told.computed, told.again = earlier.computed, earlier.again
            self._stages[event.stage] = told
        told = self._stages[event.stage]
        told.computed += event.kind == "done"
        told.again += event.kind == "again"
        told.ended, told.last = now, event
        return told

    def remind(self) -> None:
        """Print where a stage stands of which nothing has been told for long."""
        now = time.monotonic()
        for told in list(self._stages.values()):
            if told.last is not None and told.last.kind != "end" and now - told.printed >= SILENT_SECONDS:
                told.printed = now
                event = told.last
                self._print(f"{event.stage}: {event.done}/{event.total} in {now - told.began:.0f} s, at work")

    def summarise(self) -> None:
        """Print what was computed: keys, seconds and attempts in vain, by stage."""
        computed = {stage: told for stage, told in self._stages.items() if told.computed or told.again}
        if not computed:
            return
        table = Table("stage", "keys", "seconds", "in vain", box=None, pad_edge=False)
        for stage, told in computed.items():
            table.add_row(
                stage, str(told.computed), f"{(told.ended or told.began) - told.began:.1f}", str(told.again or "")
            )
        keys, again = (sum(getattr(told, name) for told in computed.values()) for name in ("computed", "again"))
        table.add_row("in all", str(keys), f"{time.monotonic() - self._started:.1f}", str(again or ""))
        self._console.print(table)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False)
