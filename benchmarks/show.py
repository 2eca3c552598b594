"""`python -m benchmarks.show AREA`: run the demonstrations behind the README and print a row each.

Invariant: a row prints only what was measured in this run. An area is a module
`benchmarks.show_<area>` with `rows(quick)`. Exit code 1 when a row falls short.
"""

import importlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, cast

from rich.console import Console
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


class Area(Protocol):
    def rows(self, quick: bool) -> Iterator[Row]:
        """Rows as they are measured; `quick` may leave the long ones reduced, and says so."""
        ...


def judged(claim: str, measured: str, bound: str, is_held: bool, why: str = "") -> Row:
    return Row(claim, measured, bound, "holds" if is_held else "falls short", why)


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
    for row in area.rows(quick):
        style = STYLES[row.verdict]
        verdict = f"[{style}]{row.verdict}[/]" + (f": {row.why}" if row.why else "")
        table.add_row(row.claim, row.measured, row.bound, verdict)
        minutes = (time.monotonic() - started) / 60
        console.print(f"[dim]{minutes:5.1f} min[/] {row.claim}: {row.measured} · {verdict}")
        has_short |= row.verdict == "falls short"
    console.print(table)
    return int(has_short)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
