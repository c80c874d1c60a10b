"""Short histories of a table; each aims at one race between a reader and the writer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from shmstore._table import layout as at
from shmstore._table.index import Region
from tests.table.tables import TWINS, noted

if TYPE_CHECKING:
    from tests.table.interleavings import Story

FIRST, SECOND = TWINS

BESIDE: Final = ("G", "b5")
"""Two codes of different tags that want the same place in the index."""

LATTER: Final = BESIDE[1]


def one_life(story: Story) -> None:
    """Create, update, delete, and create again: in the same slot, over the same lines."""
    story.create("A")
    story.update("A")
    story.delete("A")
    story.create("A", text="again")


def come_and_go(story: Story) -> None:
    """A session goes, and the next one of its code takes its slot and its lines."""
    story.create("A", text="1")
    story.delete("A")
    story.create("A", text="2")


def noted_life(story: Story) -> None:
    """As one life, for a client: rows pin blocks, and deletes have one."""
    story.create("A", note=noted(1, 1))
    story.update("A", note=noted(2, 1))
    story.delete("A", note=noted(1, 2))
    story.create("A", note=noted(2, 2))


def reused_lines(story: Story) -> None:
    """Each update takes the lines that the one before gave back."""
    story.create("A", "B")
    story.begin()
    story.update("A", text="1")
    story.update("B", text="2")
    story.update("A", text="3")


def other_in_slot(story: Story) -> None:
    """A slot goes from one code to another and back, while a third stays."""
    story.create("C", "A")
    story.begin()
    story.delete("A")
    story.create("B")
    story.delete("B")
    story.create("A")


def taking_turns(story: Story) -> None:
    """Two slots are free in turns, so that there is a session at every instant."""
    story.create("A", "B")
    story.delete("A")
    story.begin()
    for code, other in (("A", "B"), ("B", "A"), ("A", "B")):
        story.create(code)
        story.delete(other)


def first_of_one_tag(story: Story) -> None:
    """Two codes have one tag; the one that stands first in the index goes and comes back."""
    story.create(FIRST, SECOND)
    story.begin()
    story.delete(FIRST)
    story.update(SECOND)
    story.create(FIRST)


def second_of_one_tag(story: Story) -> None:
    """Two codes have one tag; the one that stands behind in the index moves to the front."""
    story.create(FIRST, SECOND)
    story.begin()
    story.delete(FIRST)
    story.delete(SECOND)
    story.create(SECOND)


def growth(story: Story) -> None:
    """The index moves, and blocks take the lines that X has its word in."""
    story.create("X")
    story.create("J", text="j" * 3720)  # so that the first region is the smallest hole
    story.begin()
    first = story.table.layout.arena_line
    story.grow()
    story.create("K")
    lines = [story.table.ctl(slot) & at.LINE_MASK for slot in story.table.writer.codes.values()]
    assert first in lines
    story.delete("K")
    story.grow("Q")


def return_of_the_region(story: Story) -> None:
    """The index moves away and comes back to the same place, with X at another place in it."""

    def place() -> int:
        return Region(story.table.words.load(at.H_REGION)).line

    first = story.table.layout.arena_line
    # Two pages with a block behind them are one of the holes that it moves between.
    story.create("J", text="j" * 3910)
    story.create("W", note=noted(1, 1))
    story.delete("J", "W")
    story.grow()
    story.grow()
    before, after = BESIDE
    story.create(before, after, text="x" * 4200)  # too long for the hole
    story.delete(before)
    story.begin()
    places = [place()]
    for _ in range(2):
        story.grow()
        places.append(place())
    assert places[0] == places[2] == first != places[1]


def new_slots(story: Story) -> None:
    """Each create takes a slot that was never used: the high-water mark moves."""
    story.create("A", "B")
    story.update("A")


def idle_end(story: Story) -> None:
    """The table ends with nothing said, and two sessions in it."""
    story.create("A", "B")
    story.begin()
    story.update("A")
    story.end(at.STATE_IDLE)


def stop(story: Story) -> None:
    """The table is stopped after its last session went."""
    story.create("A")
    story.begin()
    story.delete("A")
    story.end(at.STATE_STOPPED)


def emptied(story: Story) -> None:
    """Sessions go, one comes back and goes again: the count moves, and soon it is another."""
    story.create("A", "B", "C")
    story.begin()
    story.delete("A")
    story.delete("B")
    story.create("A")
    story.delete("A")


# --- Batches


def update_and_delete(story: Story) -> None:
    """One session is updated and another goes, as one."""
    story.create("A", "B")
    story.begin()
    story.batch(update="A", delete="B")


def both_created(story: Story) -> None:
    """Two sessions come as one, over a slot that was used and one that never was."""
    story.create("A")
    story.delete("A")
    story.begin()
    story.batch(create="AB")


def changing_hands(story: Story) -> None:
    """One session goes and another comes, as one; then back again, in the slot that was free."""
    story.create("A")
    story.begin()
    story.batch(create="B", delete="A", note=noted(1, 1))
    story.batch(create="A", delete="B", note=noted(1, 2))


def batch_after_batch(story: Story) -> None:
    """A client's last outcome is a record that its batch replaces, and then that batch."""
    story.create("A", note=noted(2, 1))
    story.create("B", note=noted(1, 1))
    story.begin()
    story.batch(update="AB", note=noted(1, 2))
    story.batch(update="BA", note=noted(1, 3))


def batch_and_bystander(story: Story) -> None:
    """A third session stays, and is written right after the batch, over the lines it gave back."""
    story.create("A", "B", "C")
    story.begin()
    story.batch(update="A", delete="B")
    story.update("C")


def batch_after_growth(story: Story) -> None:
    """The index moves, and the batch creates in the new one."""
    story.create("X")
    story.begin()
    story.grow()
    story.batch(create="K", update="X")


def forgotten_batch(story: Story) -> None:
    """The client of a batch says goodbye, and its row no more names it."""
    story.create("A", "B")
    story.begin()
    story.batch(update="AB", note=noted(1, 1))
    story.forget(noted(1, 1))
    story.update("B")


# --- Kills


def killed_create(story: Story) -> None:
    """The writer is killed in a create, over a slot and lines that were used before."""
    story.create("B", "A")
    story.delete("A")
    story.begin()
    request = noted(1, 1)
    story.killed(lambda: story.create("A", note=request), request)
    story.update("B")


def killed_update(story: Story) -> None:
    """The writer is killed in an update; the next one uses the lines that it has given back."""
    story.create("A", "B")
    story.begin()
    request = noted(1, 1)
    story.killed(lambda: story.update("A", text="1", note=request), request)
    story.update("B")


def killed_delete(story: Story) -> None:
    """The writer is killed in a delete; the slot goes to another code."""
    story.create("A")
    story.begin()
    request = noted(1, 1)
    story.killed(lambda: story.delete("A", note=request), request)
    story.create("B")


def killed_reap(story: Story) -> None:
    """The writer is killed in a delete of its own, which nobody asks for again."""
    story.create("A", "B")
    story.begin()
    story.killed(lambda: story.delete("A"))
    story.update("B")


def killed_batch(story: Story) -> None:
    """The writer is killed in a batch that does one of each."""
    story.create("A", "B")
    story.begin()
    request = noted(1, 1)
    story.killed(lambda: story.batch(create="C", update="A", delete="B", note=request), request)


def killed_pair(story: Story) -> None:
    """The writer is killed in a batch of two, and that is all."""
    story.create("A", "B")
    story.begin()
    request = noted(1, 1)
    story.killed(lambda: story.batch(update="A", delete="B", note=request), request)


def killed_moves(story: Story) -> None:
    """The writer is killed in a batch; the next one of the same client undoes half of it."""
    story.create("A", "B", note=noted(1, 1))
    story.begin()
    request = noted(1, 2)
    story.killed(lambda: story.batch(update="A", delete="B", note=request), request)
    story.batch(create="B", note=noted(1, 3))


def killed_growth(story: Story) -> None:
    """The writer is killed while the index moves, and a session comes afterwards."""
    story.create("X")
    story.begin()
    story.killed(story.grow)
    story.create("K")


def killed_damage(story: Story) -> None:
    """A record is damaged, and the writer is killed at something else: recovery sets it aside."""
    story.create("A", "B")
    story.begin()
    story.damage("A")
    request = noted(1, 1)
    story.killed(lambda: story.update("B", note=request), request)
    story.create("A")
