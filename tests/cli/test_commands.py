"""serve, stats, ls and stop, against each other."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

import shmstore
from shmstore._os.paths import store_paths
from shmstore._table import layout as at
from shmstore.cli import serving
from shmstore.cli.commands import age_text, cli
from shmstore.cli.ending import end_foreign
from shmstore.server.loop import ManagerLoop
from shmstore.wire import messages
from tests.cli.programs import control_characters, program, run
from tests.processes import is_gone, until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result

    from tests.cli.programs import Program


@pytest.fixture(name="served")
def _served(store_dir: Path, tmp_path: Path) -> Iterator[Program]:
    """Serve the store "s" in the foreground."""
    del store_dir  # it sets SHMSTORE_DIR
    with program(tmp_path, "serve", "s", "--map-size-bytes", str(1 << 22)) as running:
        running.await_output("serving store 's'")
        yield running


def invoke(*args: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(cli, list(args))


def failed(result: Result) -> str:
    """Return the one line that a command failed with."""
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    line, rest = result.stderr.split("\n", 1)
    assert not rest
    return line


def test_serve_says_where_everything_is(served: Program, store_dir: Path) -> None:
    """Table, socket and pid are in what `serve` says, in plain text."""
    said = served.output
    assert f"pid {served.pid}" in said
    assert str(store_dir / "s.table") in said
    assert str(store_dir / "s.sock") in said
    assert not control_characters(said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_ends_in_order_on_a_signal(
    served: Program, store_dir: Path, number: signal.Signals
) -> None:
    """The store ends, its files go, and the exit code is 0."""
    with shmstore.open("s", start=False) as store:
        store.create(owner_pid=None)
        os.kill(served.pid, number)
        assert served.wait() == 0
        with pytest.raises(shmstore.StoreNotRunningError):
            store.list_active()
    assert "has ended" in served.output
    assert {path.name for path in store_dir.iterdir()} == {"s.lock"}


def test_serve_takes_options_from_arguments_and_environment(
    store_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An argument wins over the environment, which wins over the default."""
    del store_dir
    monkeypatch.setenv("SHMSTORE_MAP_SIZE_BYTES", str(1 << 21))
    monkeypatch.setenv("SHMSTORE_MAX_SESSION_BYTES", "4096")
    args = ["--map-size-bytes", str(1 << 22), "--unowned-max-age-s", "none"]
    with program(tmp_path, "serve", "s", *args) as running:
        running.await_output("serving")
        for name in ("SHMSTORE_MAP_SIZE_BYTES", "SHMSTORE_MAX_SESSION_BYTES"):
            monkeypatch.delenv(name)
        wanted = {"map_size_bytes": 1 << 22, "max_session_bytes": 4096, "unowned_max_age_s": None}
        # An open that names another value than the one in force is refused.
        shmstore.open("s", start=False, idle_timeout_s=0.0, **wanted).close()  # type: ignore[call-overload]  # a mixed dict


def test_serve_takes_names_with_commas_between_them(store_dir: Path, tmp_path: Path) -> None:
    """Statuses and directions are tuples, and codes are of the kind that was given."""
    del store_dir
    args = ["--statuses", "queued, running", "--directions", "in", "--code-length", "3"]
    with program(tmp_path, "serve", "s", *args, "--alphabet", "01") as running:
        running.await_output("serving")
        names = {"statuses": ("queued", "running"), "directions": ("in",)}
        with shmstore.open("s", start=False, code_length=3, alphabet="01", **names) as store:  # type: ignore[call-overload]  # a mixed dict
            session = store.create(status="running", direction="in")
            assert len(session.code) == 3
            assert set(session.code) <= {"0", "1"}


def test_serve_ends_when_it_was_told_to_end_idle(store_dir: Path, tmp_path: Path) -> None:
    """With an idle timeout, a store without connection and session ends by itself."""
    del store_dir
    with program(tmp_path, "serve", "s", "--idle-timeout-s", "0.1") as running:
        assert running.wait() == 0
        assert "has ended" in running.output


def test_serve_tells_what_was_lost(store_dir: Path, tmp_path: Path) -> None:
    """A file that cannot be read as a table is moved aside, which is said, not hidden."""
    (store_dir / "s.table").write_bytes(bytes(2 << 20))
    with program(tmp_path, "serve", "s") as running:
        running.await_output("socket")
        running.await_output("note ")
        assert "moved aside" in running.output


def test_serve_leaves_at_once_when_the_manager_fails(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A mutation may be half done: nothing more is stored, and the reason is logged."""
    del store_dir

    def fail(_loop: ManagerLoop) -> None:
        msg = "a bug"
        raise LookupError(msg)

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(ManagerLoop, "serve", fail)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(serving, "_log_to_standard_error", lambda: None)
    assert invoke("serve", "s").exit_code == 70
    assert "LookupError: a bug" in caplog.text


def test_a_second_serve_is_refused(served: Program) -> None:
    """One line and exit code 1; the first one goes on."""
    del served
    second = run("serve", "s")
    assert second.returncode == 1
    assert second.stdout == ""
    assert second.stderr.startswith("shmstore: store 's' has a manager already")
    assert second.stderr.count("\n") == 1
    assert invoke("stats", "s").exit_code == 0


def test_serve_refuses_an_option_out_of_range(store_dir: Path) -> None:
    """A value that the store does not take is a message that names it."""
    del store_dir
    assert "map_size_bytes is from" in failed(invoke("serve", "s", "--map-size-bytes", "5"))
    wrong = invoke("serve", "s", "--unowned-max-age-s", "soon")
    assert wrong.exit_code == 2
    assert "soon" in wrong.stderr


def test_stats_shows_every_figure(served: Program) -> None:
    """The table and the JSON object have all fields of StoreStats."""
    shown = invoke("stats", "s").output
    figures = json.loads(invoke("stats", "s", "--json").output)
    assert set(figures) == set(shmstore.StoreStats.__struct_fields__)
    assert figures["manager_pid"] == served.pid
    for name in figures:
        assert f"\n{name} " in shown


def test_ls_shows_sessions(served: Program) -> None:
    """Code, status, direction, owner and age, the newest first; nobody is a dash."""
    del served
    with shmstore.open("s", start=False) as store:
        store.create(code="OLD", direction="send")
        store.create(code="NEW", status="connected", owner_pid=None)
        lines = invoke("ls", "s").output.splitlines()
    assert lines[0].split() == ["code", "status", "direction", "owner", "age"]
    assert lines[1].split()[:4] == ["NEW", "connected", "-", "-"]
    assert lines[2].split()[:4] == ["OLD", "pending", "send", str(os.getpid())]
    assert len(lines) == 3


def test_ls_json_has_everything_of_a_session(served: Program) -> None:
    """One object a line, with the caller's own keys in `data`."""
    del served
    with shmstore.open("s", start=False) as store:
        made = store.create({"sender_info": {"a": [1]}, "version": "mine", "raw": {7: b"\0"}})
        (line,) = invoke("ls", "s", "--json").output.splitlines()
    shown = json.loads(line)
    assert shown["code"] == made.code
    assert shown["version"] == made.version
    assert shown["sender_info"] == {"a": [1]}
    assert shown["data"] == {"version": "mine", "raw": {"7": "AA=="}}


def test_ls_escapes_what_steers_a_terminal(served: Program) -> None:
    """A code is anybody's text: no escape sequence in it reaches the terminal."""
    del served
    with shmstore.open("s", start=False) as store:
        store.create(code="\x1b[31mé[red]\u202e", owner_pid=None)
        output = invoke("ls", "s").output
    assert r"\x1b[31mé[red]\u202e" in output
    assert not control_characters(output)


def test_ls_in_a_pipe_is_plain_and_whole(served: Program) -> None:
    """No width, no FORCE_COLOR and no ASCII terminal takes anything away from a piped table."""
    del served
    code = "é" * 120
    with shmstore.open("s", start=False) as store:
        store.create(code=code)
        piped = run("ls", "s", FORCE_COLOR="1", COLUMNS="20")
        ascii_only = run("ls", "s", PYTHONIOENCODING="ascii")
    assert code in piped.stdout
    assert not control_characters(piped.stdout)
    assert r"\xe9" * 120 in ascii_only.stdout


def test_stop_ends_the_store_and_waits_for_its_manager(store_dir: Path) -> None:
    """When `stop` returns the manager has left, so the next one can be started at once."""
    del store_dir
    with shmstore.open("s") as store:
        manager_pid = store.stats().manager_pid
    assert "has ended" in invoke("stop", "s").output
    until(lambda: is_gone(manager_pid))
    assert "is not running" in failed(invoke("stop", "s"))


def test_stop_ends_a_manager_of_another_version(
    served: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of every other command names `shmstore stop`, so that has to work."""
    monkeypatch.setattr(messages, "WIRE", messages.WIRE + 1)
    assert "end it with `shmstore stop" in failed(invoke("stats", "s"))
    stopped = invoke("stop", "s")
    assert stopped.exit_code == 0, stopped.output
    assert served.wait() == 0
    with pytest.raises(shmstore.StoreNotRunningError):
        end_foreign(store_paths("s"))


def test_stop_ends_what_serve_serves(served: Program) -> None:
    """`serve` returns with exit code 0."""
    assert invoke("stop", "s").exit_code == 0
    assert served.wait() == 0


@pytest.mark.parametrize("command", ["stats", "ls", "stop"])
def test_looking_never_starts_a_store(store_dir: Path, command: str) -> None:
    """Without a store the others fail with one line, and make nothing."""
    assert failed(invoke(command, "s")).startswith("shmstore: store 's' is not running")
    assert not list(store_dir.iterdir())


def test_a_name_or_an_environment_that_is_wrong_is_a_message(
    store_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Python calls a ValueError is a line here, too."""
    del store_dir
    assert "is no store name" in failed(invoke("ls", "a/b"))
    monkeypatch.setenv("SHMSTORE_TIMEOUT_S", "soon")
    assert "SHMSTORE_TIMEOUT_S='soon'" in failed(invoke("ls", "s"))


@pytest.mark.parametrize(
    ("age_s", "text"),
    [(-3, "0s"), (59.9, "59s"), (61, "1m 01s"), (3600 * 5, "5h 00m"), (86400 * 3 + 7200, "3d 02h")],
)
def test_an_age_is_told_in_two_units(age_s: float, text: str) -> None:
    """Ages are short; one from the future is none."""
    assert age_text(age_s) == text


def test_check(served: Program) -> None:
    """A sound table is said to be so; what is wrong is a line each, and exit code 1."""
    with shmstore.open("s", start=False) as store:
        store.create(code="A")
        table = Path(store.stats().table_path)
        assert invoke("check", "s").output == "store 's' is live, and sound: 1 sessions\n"
        os.kill(served.pid, signal.SIGKILL)
        until(lambda: is_gone(served.pid))
        assert invoke("check", "s").output == "store 's' has no manager, and sound: 1 sessions\n"
        with table.open("r+b") as file:
            file.seek(at.H_COUNT * at.WORD_BYTES)
            file.write(bytes(at.WORD_BYTES))
    done = invoke("check", "s")
    assert done.exit_code == 1
    assert "count: says 0, and there are 1 sessions" in done.output
    assert "1 things are wrong" in done.output
    table.unlink()
    assert "nothing to verify" in failed(invoke("check", "s"))
