"""`python -m benchmarks.show AREA`: run the demonstrations behind the README and print a row each.

Invariant: a row prints only what was measured in this run. An area is a module
`benchmarks.show_<area>` with `rows(quick)`; a measurement that raises is a row that falls short.
Exit code 1 when a row falls short.
"""

import importlib
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table

AREAS = ("foundation", "learner", "rewards", "durability", "serve", "cluster")
STYLES = {"holds": "green", "falls short": "bold red", "not shown here": "yellow"}


class Row(NamedTuple):
    """One claim. `why` says what is missing of a row that falls short or is not shown here."""

    claim: str
    measured: str
    bound: str
    verdict: Literal["holds", "falls short", "not shown here"]
    why: str = ""


class Part(NamedTuple):
    """Rows still to be measured: what raises in `measure` costs no other part of the area."""

    claim: str
    measure: "Callable[[], Iterable[Row | Part]]"


class Area(Protocol):
    def rows(self, quick: bool) -> Iterator[Row | Part]:
        """Rows as they are measured; `quick` may leave the long ones reduced, and says so."""
        ...


def judged(claim: str, measured: str, bound: str, is_held: bool, why: str = "") -> Row:
    return Row(claim, measured, bound, "holds" if is_held else "falls short", why)


def measured(part: Part) -> Iterator[Row]:
    """The rows of `part`, and a last one with the reason when it raises."""
    try:
        for row in part.measure():
            if isinstance(row, Part):
                yield from measured(row)
            else:
                yield row
    except Exception as error:  # the other parts are still to be shown
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        yield judged(part.claim, "no figure", "an end", False, reason[-300:])


def main(arguments: list[str]) -> int:
    known = [a for a in AREAS if (Path(__file__).parent / f"show_{a}.py").exists()]
    if len(arguments) != 1 or arguments[0] not in known:
        print(f"usage: make show AREA={'|'.join(known)} [QUICK=1]", file=sys.stderr)
        return 2
    quick = os.environ.get("QUICK", "0") not in ("", "0")
    area = cast(Area, importlib.import_module(f"benchmarks.show_{arguments[0]}"))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    table = Table("claim", "measured", "bound", "verdict", title=arguments[0], show_lines=True)
    started = time.monotonic()
    has_short = False
    for row in measured(Part("the rows that follow", lambda: area.rows(quick))):
        style = STYLES[row.verdict]
        claim, figure, bound, why = map(escape, (row.claim, row.measured, row.bound, row.why))
        verdict = f"[{style}]{row.verdict}[/]" + (f": {why}" if why else "")
        table.add_row(claim, figure, bound, verdict)
        minutes = (time.monotonic() - started) / 60
        console.print(f"[dim]{minutes:5.1f} min[/] {claim}: {figure} · {verdict}")
        has_short |= row.verdict == "falls short"
    console.print(table)
    return int(has_short)


if __name__ == "__main__":
    from benchmarks import show  # areas yield its `Part`, which is not this module's

    sys.exit(show.main(sys.argv[1:]))
