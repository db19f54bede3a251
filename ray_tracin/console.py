"""How the command line speaks: where it prints, and how an error becomes a message and an exit code."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table

from ray_tracin.claims import ClaimHeldError
from ray_tracin.vocabulary import UsageError

LOG_WIDTH = 160
# A log has no width that lines must keep to.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else LOG_WIDTH)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def failing_clearly(debug: bool) -> Iterator[None]:
    """Turn an error into a message and an exit code."""
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        fail("interrupted; what is done is kept, the same command goes on", 130)
    except Exception as error:
        if debug:
            raise
        notes = "".join(f"\n  ({note})" for note in getattr(error, "__notes__", ()))
        known = isinstance(error, ValueError | OSError)
        kind = "" if known else f"{type(error).__name__}: "
        hint = "" if known else "\nThis is not an error that was foreseen: --debug shows where it comes from"
        fail(f"{kind}{error}{notes}{hint}", 2 if isinstance(error, UsageError) else 1)


@contextmanager
def configuring(debug: bool) -> Iterator[None]:
    """The part of a command in which an error is the configuration's."""
    try:
        yield
    except ClaimHeldError:
        raise  # Which no other setting would help.
    except (ValueError, OSError) as error:
        if debug:
            raise
        fail(str(error), 2)


def fail(message: str, code: int) -> NoReturn:
    """Say what went wrong, and end with the code."""
    err.print(f"[bold red]error:[/] {message.replace('[', chr(92) + '[')}")
    raise typer.Exit(code)


def print_lines(lines: Iterable[str]) -> None:
    """Print text as it is."""
    for line in lines:
        out.print(line, markup=False)


def print_pairs(title: str, lines: Sequence[tuple[str, str]]) -> None:
    """Print a table of what and how much."""
    table = Table("what", "how much", title=title)
    for what, how_much in lines:
        table.add_row(what, how_much)
    out.print(table)
