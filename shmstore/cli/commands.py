"""The commands: what is asked for, from which store, and how it is shown.

Rules: only `serve` and `demo` start a store; the others look at what runs. An error of ours is one
line on standard error and exit code 1, without a traceback.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click
import msgspec

import shmstore
from shmstore._os.paths import store_paths
from shmstore.cli.ending import end_foreign, end_store
from shmstore.cli.output import Screen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shmstore.cli.output import Cell

_NONE: Final = "none"


class _Message(click.ClickException):
    """An error as one line, and exit code 1."""

    def show(self, file: Any = None) -> None:  # click's signature
        """Write the line."""
        click.echo(f"shmstore: {' '.join(self.message.split())}", file=file, err=True)


class _Commands(click.Group):
    """Commands whose errors of ours are messages."""

    def invoke(self, ctx: click.Context) -> Any:  # click's signature
        """Run the command."""
        try:
            return super().invoke(ctx)
        except shmstore.ShmStoreError as error:
            raise _Message(str(error)) from error


def _seconds_or_none(text: str) -> float | str:
    """Return the number, or the word: None would be an option that was not given."""
    return text if text == _NONE else float(text)


def _names(text: str) -> tuple[str, ...]:
    """Return names that stand side by side, with commas."""
    return tuple([name.strip() for name in text.split(",")])


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(shmstore.__version__, prog_name="shmstore")
def cli() -> None:
    """Look after stores of sessions in shared memory.

    A store's files are in SHMSTORE_DIR; without it, in this user's own directory in /dev/shm.
    """


@cli.command()
@click.argument("name")
@click.option("--map-size-bytes", type=int, help="The table's size at most; 1 GiB.")
@click.option("--max-session-bytes", type=int, help="One session at most; 16 MiB.")
@click.option(
    "--unowned-max-age-s",
    type=_seconds_or_none,
    metavar="FLOAT|none",
    help="How long a session of nobody lives after its last write; 86400; none: for ever.",
)
@click.option(
    "--idle-timeout-s",
    type=float,
    help="How long to stay without connection and session; 0, which is for ever.",
)
@click.option("--sweep-interval-s", type=float, help="How often all owners are looked at; 60.")
@click.option("--statuses", type=_names, metavar="A,B", help="Statuses beside the built-in four.")
@click.option("--directions", type=_names, metavar="A,B", help="Directions beside the two.")
@click.option("--code-length", type=int, help="Characters of a made-up code; 8.")
@click.option("--alphabet", help="The characters that it is made of; 32 of them.")
def serve(name: str, **given: object) -> None:
    """Serve the store NAME from this very process, until Ctrl-C or SIGTERM.

    What is not given is taken from the environment: SHMSTORE_MAP_SIZE_BYTES and so on.
    """
    from shmstore.cli import serving  # the whole manager, which the other commands need not load

    options = {
        option: None if value == _NONE else value
        for option, value in given.items()
        if value is not None
    }
    with _mistakes_as_messages():
        serving.serve(name, options, Screen())


@cli.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def stats(name: str, *, as_json: bool) -> None:
    """Show the figures of the store NAME."""
    with _attached(name) as store:
        figures = store.stats()
    if as_json:
        click.echo(msgspec.json.encode(figures).decode())
        return
    shown = {**msgspec.structs.asdict(figures), "uptime_s": f"{figures.uptime_s:.1f}"}
    Screen().table(["figure", "value"], [(figure, str_of(shown[figure])) for figure in shown])


@cli.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each session.")
def ls(name: str, *, as_json: bool) -> None:
    """List the sessions of the store NAME, the newest first."""
    with _attached(name) as store:
        sessions = store.list_active()
    if as_json:
        for session in sessions:
            click.echo(msgspec.json.encode(_json_of(session)).decode())
        return
    now = datetime.now(UTC)
    Screen().table(
        ["code", "status", "direction", "owner", "age"], [_row_of(s, now) for s in sessions]
    )


@cli.command()
@click.argument("name")
def stop(name: str) -> None:
    """End the store NAME: its sessions are gone, its manager exits."""
    try:
        with _attached(name) as store:
            end_store(store)
    except (shmstore.ProtocolError, shmstore.TableFormatError):
        end_foreign(store_paths(name))
    Screen().say(f"store {name!r} has ended")


@cli.command()
@click.argument("name")
@click.pass_context
def check(context: click.Context, name: str) -> None:
    """Verify the table of the store NAME: a line for each thing that is wrong, and exit code 1.

    A live table is verified as it was at one instant, and nobody has to wait for it. So is one
    whose manager is dead; what the kill left half done, the next start mends.
    """
    from shmstore.store import verifying  # the checker, which nothing else here needs

    with _mistakes_as_messages():
        found = verifying.verify(store_paths(name))
    screen = Screen()
    what = "is live" if found.is_live else "has no manager"
    for violation in found.violations:
        screen.say(f"{violation.where}: {violation.what}", style="red")
    if found.violations:
        screen.say(f"store {name!r} {what}, and {len(found.violations)} things are wrong")
        context.exit(1)
    screen.say(f"store {name!r} {what}, and sound: {found.sessions_count} sessions")


@cli.command()
@click.option("--gunicorn", "under_gunicorn", is_flag=True, help="With gunicorn, over HTTP.")
@click.option(
    "--workers", type=click.IntRange(2, 16), default=3, show_default=True, help="How many."
)
def demo(*, under_gunicorn: bool, workers: int) -> None:
    """Show it all: share sessions between processes, kill one of them, measure a read.

    On a store of its own, which is gone afterwards, as is everything else that it makes.
    """
    from shmstore.cli import demo_gunicorn, demo_processes  # subprocess, http: for this alone

    show = demo_gunicorn.show if under_gunicorn else demo_processes.show
    show(Screen(), workers)


@contextlib.contextmanager
def _mistakes_as_messages() -> Iterator[None]:
    """Show a value that is out of range, in an argument or in the environment, as a message."""
    try:
        yield
    except (TypeError, ValueError) as error:
        if isinstance(error, shmstore.ShmStoreError):
            raise
        raise _Message(str(error)) from error


@contextlib.contextmanager
def _attached(name: str) -> Iterator[shmstore.SessionStore]:
    """Open a store that runs."""
    with _mistakes_as_messages():
        store = shmstore.open(name, start=False)
    with store:
        yield store


def str_of(value: object) -> str | None:
    """Return a figure as text, None if there is none."""
    return None if value is None else str(value)


def _row_of(session: shmstore.Session, now: datetime) -> tuple[Cell, ...]:
    age_s = (now - session.created_at).total_seconds()
    return session.code, session.status, session.direction, session.owner_pid, age_text(age_s)


def _json_of(session: shmstore.Session) -> dict[str, object]:
    """Return a session as JSON takes it: `data` apart, for a key may have a field's name."""
    fields = {name: getattr(session, name) for name in session.__struct_fields__}
    plain: dict[str, object] = msgspec.to_builtins(fields, str_keys=True)
    return plain


def age_text(age_s: float) -> str:
    """Return an age in its two largest units."""
    seconds = max(0, int(age_s))  # the wall clock may have been set back
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d {hours:02d}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"
