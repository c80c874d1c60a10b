"""What the program says: to a person by rich, to a pipe as plain text.

rich's own way with pipes would cut tables at 80 columns and obey FORCE_COLOR. A pipe gets every
character, no control code, and each line at once.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from rich.console import Console

Cell = str | int | None


class Screen:
    """Standard output."""

    def __init__(self) -> None:
        self._stream = sys.stdout
        self._console = _console(self._stream) if self._stream.isatty() else None

    def say(self, text: str = "", *, style: str = "") -> None:
        """Write a line. The style is for a terminal only."""
        if self._console is None:
            self._write(text)
        else:
            self._console.print(_printable(text), style=style or None, soft_wrap=True)

    def title(self, text: str) -> None:
        """Begin a part."""
        self.say()
        self.say(text, style="bold cyan")

    def table(self, headers: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Write rows in columns; whole numbers stand on the right, None is a dash."""
        rows = list(rows)
        right = [bool(rows) and all(_is_right(row[i]) for row in rows) for i in range(len(headers))]
        shown = [[_printable("-" if cell is None else str(cell)) for cell in row] for row in rows]
        if self._console is None:
            self._plain_table([list(headers), *shown], right)
        else:
            _rich_table(self._console, headers, shown, right)

    def _plain_table(self, rows: list[list[str]], right: list[bool]) -> None:
        widths = [max(len(row[i]) for row in rows) for i in range(len(right))]
        for row in rows:
            cells = [
                cell.rjust(width) if on_right else cell.ljust(width)
                for cell, width, on_right in zip(row, widths, right, strict=True)
            ]
            self._write("  ".join(cells).rstrip())

    def _write(self, text: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        text = _printable(text).encode(encoding, "backslashreplace").decode(encoding)
        self._stream.write(text + "\n")
        self._stream.flush()


def _is_right(cell: Cell) -> bool:
    return cell is None or isinstance(cell, int)


def _printable(text: str) -> str:
    """Return the text with everything escaped that could steer a terminal: codes are anyone's."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _console(stream: Any) -> Console:  # click's runner has a stream of its own kind
    from rich.console import Console  # 60 ms that a pipe need not pay

    return Console(file=stream, markup=False, highlight=False, emoji=False)


def _rich_table(
    console: Console, headers: Sequence[str], rows: list[list[str]], right: list[bool]
) -> None:
    from rich.table import Table  # as above
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for header, on_right in zip(headers, right, strict=True):
        table.add_column(Text(header), justify="right" if on_right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
