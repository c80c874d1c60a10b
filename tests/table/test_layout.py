"""The geometry and the header: what is written is read, and what cannot be a table is refused."""

from __future__ import annotations

from typing import Final

import hypothesis
import pytest
from hypothesis import strategies as st

from shmstore import config
from shmstore._table import header, index
from shmstore._table import layout as at
from shmstore._table.layout import Layout
from shmstore._table.writer import end_table
from shmstore.errors import TableCorruptError, TableFormatError
from shmstore.model import StoreOptions
from tests.table.tables import BASE, Table, anonymous, noted

SIZES: Final = st.integers(1, 1 << 14).map(lambda mib: mib << 20)


@hypothesis.given(size=SIZES, rows=st.integers(1, config.ROWS_COUNT))
def test_the_parts_of_a_table_follow_each_other(size: int, rows: int) -> None:
    """Each part begins on a page, behind the part before, and the arena takes most."""
    layout = Layout.of_size(size, rows)
    ctl, touch, arena = layout.ctl_offset, layout.touch_offset, layout.arena_offset
    assert all(offset % at.PAGE_BYTES == 0 for offset in (ctl, touch, arena))
    assert layout.rows_index * at.WORD_BYTES == at.PAGE_BYTES
    assert at.PAGE_BYTES + rows * at.WORD_BYTES <= ctl
    assert ctl + layout.slots_max * at.WORD_BYTES <= touch
    assert touch + layout.slots_max * at.WORD_BYTES <= arena
    assert (layout.ctl_index, layout.touch_index) == (ctl // 8, touch // 8)
    assert layout.arena_line * at.LINE_BYTES == arena
    assert layout.lines_max * at.LINE_BYTES == size
    assert arena < size * 0.99
    assert layout.lines_max <= 1 << at.LINE_BITS


def test_a_table_tells_its_layout() -> None:
    """An attaching reader finds the geometry that the maker used."""
    table = Table()
    layout = Layout.of_table(table.view, len(table.buffer))
    found = layout.map_size_bytes, layout.rows_max, layout.slots_max, layout.arena_line
    made = table.layout
    assert found == (made.map_size_bytes, made.rows_max, made.slots_max, made.arena_line)


@pytest.mark.parametrize(
    ("where", "word", "message", "expected", "found"),
    [
        (at.H_MAGIC, 1, "not a shmstore table", at.MAGIC, 1),
        (at.H_FORMAT, 2, "has format 2", at.FORMAT, 2),
        (at.H_MAP_BYTES, 8192, "does not fit its file", 8192, 1 << 18),
        (at.H_ROWS, 1 << 40, "does not fit its file", 1 << 18, 1 << 18),
        (at.H_SLOTS, 1 << 40, "does not fit its file", 1 << 18, 1 << 18),
        (at.H_SLOTS, 1 << 15, "does not fit its file", 1 << 18, 1 << 18),
    ],
)
def test_what_cannot_be_a_table_is_refused(
    where: int, word: int, message: str, expected: int, found: int
) -> None:
    """Another magic number, format or size is an error that says what was expected and found."""
    table = Table()
    table.words.store(where, word)
    with pytest.raises(TableFormatError, match=message) as caught:
        Layout.of_table(table.view, len(table.buffer))
    assert (caught.value.expected, caught.value.found) == (expected, found)


_NAMES: Final = st.lists(st.from_regex(r"[a-z0-9_-]{1,32}", fullmatch=True), max_size=40).map(tuple)
_SECONDS: Final = st.integers(0, 10**11).map(lambda ms: ms / 1000)


@hypothesis.given(
    options=st.builds(
        StoreOptions,
        map_size_bytes=st.just(1 << 20),
        max_session_bytes=st.integers(1, 1 << 40),
        unowned_max_age_s=st.none() | _SECONDS,
        idle_timeout_s=_SECONDS,
        sweep_interval_s=_SECONDS,
        statuses=_NAMES,
        directions=_NAMES,
        code_length=st.integers(1, 255),
        alphabet=st.text(st.characters(codec="utf-8"), min_size=2, max_size=64),
    ),
    boot_id=st.integers(0, (1 << 128) - 1),
)
def test_the_header_keeps_the_options(options: StoreOptions, boot_id: int) -> None:
    """Options and boot id come back from the header as they were given."""
    words = anonymous(1 << 20)
    layout = Layout.of_size(1 << 20, 64)
    header.create(words, layout, options, base=BASE, salt=3, boot_id=boot_id, created_ns=9)
    assert header.options_of(words.view) == options
    assert header.boot_id_of(words.view) == boot_id
    assert words.load(at.H_STATE) == at.STATE_BUILDING
    assert words.load(at.H_LINES_RESERVED) == header.first_lines(layout)
    region = index.Region(words.load(at.H_REGION))
    assert region.within(layout.arena_line, header.first_lines(layout))
    assert not region.within(layout.arena_line, header.first_lines(layout) - 1)


def _declared(length_bytes: int) -> StoreOptions:
    """Return options that take so many bytes of the header's page."""
    others = len(header.declared_of(StoreOptions(alphabet="x" * 256))) - 256
    return StoreOptions(alphabet="x" * (length_bytes - others))


def test_what_is_declared_may_fill_the_page_and_no_more() -> None:
    """The last byte of the header's page is used, and the one behind it is refused."""
    words = anonymous(1 << 20)
    layout = Layout.of_size(1 << 20, 64)
    full = _declared(at.DECLARED_BYTES_MAX)
    header.create(words, layout, full, base=BASE, salt=3, boot_id=1, created_ns=9)
    assert header.options_of(words.view).alphabet == full.alphabet
    assert words.load(layout.rows_index) == 0
    with pytest.raises(ValueError, match="declare fewer"):
        header.declared_of(_declared(at.DECLARED_BYTES_MAX + 1))


@pytest.mark.parametrize("word", [at.H_DECLARED_BYTES, at.H_DECLARED_CHECK, at.H_DECLARED])
@pytest.mark.parametrize("bit", [0, 7, 63])
def test_declared_options_that_are_damaged(word: int, bit: int) -> None:
    """A changed bit of them, of their length or of their checksum is found; so are zeros."""
    table = Table()
    table.words.store(word, table.words.load(word) ^ 1 << bit)
    with pytest.raises(TableCorruptError, match="options"):
        header.options_of(table.view)
    for zero in (at.H_DECLARED_BYTES, at.H_DECLARED_CHECK):
        table.words.store(zero, 0)
    with pytest.raises(TableCorruptError, match="options"):
        header.options_of(table.view)


def test_the_version_reached_is_that_of_the_highest_lsn_anywhere() -> None:
    """Control words (free ones too), rows (given back too) and the region word all count."""
    table = Table()

    def reached() -> int:
        return header.version_reached(table.view, table.layout)

    assert reached() == BASE
    created = table.create("A")
    assert reached() == created.version
    table.update("A", note=noted(1, 1))
    table.delete("A", note=noted(1, 2))
    assert reached() == BASE + table.writer.lsn == BASE + 3
    for number in range(10):
        table.create(f"c{number}")
        table.delete(f"c{number}")
        assert reached() == BASE + table.writer.lsn
    table.create("B", note=noted(1, 3))
    table.writer.forget(noted(1, 3).client)
    end_table(table.words, table.layout, at.STATE_STOPPED)
    assert reached() == BASE + table.writer.lsn
    table.words.store(table.layout.ctl_index, 0)
    table.words.store(table.layout.ctl_index + 1, 0)
    assert reached() == BASE + table.writer.lsn, "the row kept it"


def test_the_figures_have_the_names_of_the_statistics() -> None:
    """What the header counts is named as in StoreStats."""
    table = Table()
    table.create("A")
    table.create("B")
    table.update("A")
    table.delete("B")
    figures = header.figures_of(table.view)
    wanted = {"count": 1, "created": 2, "updated": 1, "deleted": 1, "lsn": 4, "reaped": 0}
    assert wanted.items() <= figures.items()
    assert figures["map_size_bytes"] == table.layout.map_size_bytes
