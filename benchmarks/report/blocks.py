"""Blocks of a report section, which the page and the terminal show."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table as RichTable

NONE = "\N{EN DASH}"
"""Text of a cell without a figure."""


class Pair(NamedTuple):
    """A cell with a figure, and in small print below it a qualification such as an interval."""

    main: str
    small: str


@dataclass(frozen=True)
class Picture:
    """An image inside the page.

    Attributes:
        text: description for readers who cannot see the image.
        address: data URL of a PNG; None where the file is missing.
        width, height: size in pixels.
    """

    text: str
    address: str | None = None
    width: int = 0
    height: int = 0


Cell = str | Pair | Picture | tuple[Picture, ...]


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        value: function that returns the cell of a row.
        meaning: explanation of the heading; empty if the heading is enough.
        numeric: whether the column is aligned to the right.
        terminal: whether the terminal shows the column too.
    """

    heading: str
    value: Callable[[Any], Cell]
    meaning: str = ""
    numeric: bool = True
    terminal: bool = True


@dataclass(frozen=True)
class Table:
    """A table; its first column names the row.

    Attributes:
        ours: function that returns whether a row is highlighted as offcut's own.
        terminal: whether the terminal shows the table too.
    """

    kind = "table"
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Any]
    ours: Callable[[Any], bool] = lambda row: False
    terminal: bool = True

    def filled(self) -> tuple[list[Column], list[list[Cell]]]:
        """Return the columns in which a row has a figure, and the cells of each row in these columns."""
        cells = [[column.value(row) for column in self.columns] for row in self.rows]
        places = [place for place in range(len(self.columns)) if place == 0 or any(row[place] != NONE for row in cells)]
        return [self.columns[place] for place in places], [[row[place] for place in places] for row in cells]


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    kind = "note"
    text: str


@dataclass(frozen=True)
class Plot:
    """A plot, drawn when the page is made.

    Attributes:
        title: caption and description of the plot.
        draw: function that returns the matplotlib figure.
    """

    kind = "plot"
    title: str
    draw: Callable[[], Figure]


@dataclass(frozen=True)
class Facts:
    """A list of names with their values."""

    kind = "facts"
    values: Mapping[str, str]


@dataclass(frozen=True)
class Group:
    """Blocks under a heading; on the page, a ``folded`` group is hidden until the reader opens it."""

    kind = "group"
    title: str
    blocks: Sequence[Block]
    folded: bool = False


Block = Table | Note | Plot | Facts | Group


@dataclass(frozen=True)
class Section:
    """The section of a report on the result of one benchmark.

    Attributes:
        name: short name for the page's list of contents.
        title: heading of the section.
        task: sentence that says what was measured.
    """

    name: str
    title: str
    task: str
    blocks: Sequence[Block]


def for_terminal(section: Section) -> Iterator[RichTable | str]:
    """Yield the section's tables and notes in the form that rich prints."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table as RichTable

    yield escape(section.task)
    for block in _flat(section.blocks):
        if isinstance(block, Note):
            yield escape(block.text)
        elif isinstance(block, Table) and block.terminal:
            columns, rows = block.filled()
            shown_columns = [place for place, column in enumerate(columns) if column.terminal]
            yield escape(block.caption)
            table = RichTable(box=SIMPLE, padding=(0, 0, 0, 0), pad_edge=False)
            for place in shown_columns:
                texts = [columns[place].heading, *(_text(cells[place]) for cells in rows)]
                longest = max(len(word) for text in texts for word in [*text.split(), ""])
                justify: Any = "right" if columns[place].numeric and place > 0 else "left"
                table.add_column(escape(texts[0]), justify=justify, overflow="fold", min_width=min(longest, 20))
            for row, cells in zip(block.rows, rows, strict=True):
                style = "bold" if block.ours(row) else None
                table.add_row(*(escape(_text(cells[place])) for place in shown_columns), style=style)
            yield table


def _flat(blocks: Sequence[Block]) -> Iterator[Block]:
    for block in blocks:
        if isinstance(block, Group):
            yield from _flat(block.blocks)
        else:
            yield block


def _text(cell: Cell) -> str:
    return cell if isinstance(cell, str) else cell.main if isinstance(cell, Pair) else ""
