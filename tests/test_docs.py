"""What is written of the package is true: examples run, links resolve, numbers are the code's."""

from __future__ import annotations

import ast
import doctest
import http.client
import importlib
import inspect
import re
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
import pytest

import shmstore
from shmstore import config, errors
from shmstore._os import paths
from shmstore._table import index, layout, record
from shmstore._table.record import ClientId, Item, Note
from shmstore.cli.commands import cli
from shmstore.model import Owner, StoreOptions
from shmstore.store import settings
from tests.table import test_crash_mutants as crash_mutants
from tests.table import test_crashes as crashes
from tests.table import test_interleaved_batches as batches
from tests.table import test_interleavings as interleavings
from tests.table import test_mutants as mutants

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT: Final = Path(__file__).parents[1]
README: Final = ROOT / "README.md"
DOCS: Final = ROOT / "docs"
PAGES: Final = [README, *sorted(p for p in DOCS.rglob("*.md") if "_build" not in p.parts)]
LINE_MAX: Final = 100
TIMEOUT_S: Final = 60.0


def named(page: Path) -> str:
    """Return a page's name from the root."""
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    """Return a page's fenced blocks, in their order."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return [Block(language, text) for language, text in found]


def without_blocks(page: Path) -> str:
    """Return a page's text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


# --- Commands


def commands() -> list[str]:
    """Return the README's lines that set everything up."""
    lines = "".join(block.text for block in blocks(README) if block.language == "sh").splitlines()
    return [line for line in lines if line.startswith("python3 -m venv")]


def test_the_readme_has_one_line_for_the_demo_and_one_for_the_tests() -> None:
    demo, tests = commands()
    assert demo.endswith("shmstore demo")
    assert tests.endswith("python -m pytest")


def test_ci_runs_the_readmes_test_command_to_the_letter() -> None:
    script = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    assert commands()[1] in script


# --- Examples


class Example(NamedTuple):
    """A program on a page, and what the page says that it prints."""

    page: Path
    program: str
    printed: str

    def __str__(self) -> str:
        return f"{named(self.page)}: {self.program.splitlines()[0]}"


def programs() -> Iterator[Example]:
    """Yield the programs that are whole: those behind which stands what they print."""
    for page in PAGES:
        before = ""
        for block in blocks(page):
            if block.language == "python":
                # The pieces of a tutorial are one program, put together by who reads it.
                before = before + block.text if page.parent.name == "tutorial" else block.text
            elif block.language == "text" and before:
                yield Example(page, before, block.text)
                before = ""


def test_there_are_programs_to_run() -> None:
    pages = {example.page for example in programs()}
    assert {README, DOCS / "tutorial/first-store.md", DOCS / "how-to/multiprocessing.md"} <= pages


@pytest.mark.parametrize("example", list(programs()), ids=str)
def test_an_example_prints_what_its_page_says(
    example: Example, store_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "example.py"
    file.write_text(example.program)
    ran = subprocess.run(
        [sys.executable, "-W", "error", str(file)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        cwd=store_dir,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, example.printed, "")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language == "python" for b in blocks(page))], ids=named
)
def test_what_is_shown_of_python_is_python(page: Path) -> None:
    for block in blocks(page):
        if block.language == "python":
            compile(block.text, named(page), "exec")


class UnixConnection(http.client.HTTPConnection):
    """HTTP over an AF_UNIX socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connect to the path."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))


def asked(path: Path) -> str | None:
    """Return the answer of the server behind a socket, None while there is none."""
    connection = UnixConnection(path)
    try:
        connection.request("GET", "/")
        return connection.getresponse().read().decode()
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    finally:
        connection.close()


@pytest.mark.parametrize("page", [README, DOCS / "how-to/gunicorn.md"], ids=named)
def test_the_application_for_gunicorn_runs_by_the_command_beside_it(
    page: Path, store_dir: Path, tmp_path: Path, until: Callable[..., Any]
) -> None:
    """Its answer is the code of a session that all processes see, and that goes with its worker."""
    (application,) = (block.text for block in blocks(page) if "def app(" in block.text)
    (command,) = (block.text for block in blocks(page) if block.text.startswith("gunicorn "))
    (tmp_path / "app.py").write_text(application)
    path = store_dir / "http"
    server = subprocess.Popen(
        [sys.executable, "-m", *shlex.split(command), "--bind", f"unix:{path}"],
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    try:
        code = until(lambda: asked(path))
        with shmstore.open("gunicorn", start=False) as store:
            assert store[code].direction == "send"
            server.send_signal(signal.SIGTERM)
            server.wait(TIMEOUT_S)
            until(lambda: code not in store)
    finally:
        server.kill()
        server.wait()


# --- Docstrings


def doctests() -> Iterator[doctest.DocTest]:
    """Yield the examples in the docstrings of everything public."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    yield from finder.find(shmstore, "shmstore", globs={})
    for name in shmstore.__all__:
        public = getattr(shmstore, name)
        if inspect.isclass(public) or inspect.isfunction(public):
            for part in (public, *ours_above(public)):
                module = importlib.import_module(part.__module__)
                yield from finder.find(part, f"shmstore.{name}", module, globs=dict(vars(module)))


def ours_above(public: object) -> list[type]:
    """Return the classes of ours from which a class has methods, which are as public."""
    above = inspect.getmro(public)[1:] if inspect.isclass(public) else ()
    return [kind for kind in above if kind.__module__.startswith("shmstore.")]


EXAMPLES: Final = [test for test in doctests() if test.examples]


def test_there_are_docstrings_to_run() -> None:
    assert {"shmstore", "shmstore.SessionStore.create"} <= {test.name for test in EXAMPLES}


@pytest.mark.parametrize("test", EXAMPLES, ids=lambda test: test.name)
@pytest.mark.usefixtures("store_dir")
def test_a_docstrings_example_prints_what_it_says(test: doctest.DocTest) -> None:
    """Those marked SKIP too: the mark is for runs that have no directory of their own."""
    for example in test.examples:
        example.options.pop(doctest.SKIP, None)
    with shmstore.open("sync") as store:
        test.globs["store"] = store
        _run(test)


def _run(test: doctest.DocTest) -> None:
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=said.append)
    assert not result.failed, "".join(said)


# --- Links and lines


def slug(heading: str) -> str:
    """Return a heading's anchor, as GitHub and MyST make it."""
    plain = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return plain.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page."""
    return {slug(h) for h in re.findall(r"^#+ (.+)$", without_blocks(page), re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if re.match(r"https?://", target):
            continue
        place, _, anchor = target.partition("#")
        file = page.parent / place if place else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_lines_are_short(page: Path) -> None:
    """But for commands to copy: those are one line, however long."""
    long = [
        number
        for number, line in enumerate(page.read_text().splitlines(), 1)
        if len(line) > LINE_MAX and line not in commands()
    ]
    assert not long


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_page_is_in_a_table_of_contents(page: Path) -> None:
    """What no toctree names is not found by who reads the built pages."""
    if page in {README, DOCS / "index.md"}:
        return
    listed = "".join(b.text for b in blocks(DOCS / "index.md") if b.language == "{toctree}")
    name = str(page.relative_to(DOCS).with_suffix(""))
    entries = listed.splitlines()
    assert name in entries or f"{Path(name).parent}/*" in entries


# --- Tables


def rows(page: Path, *header: str) -> list[list[str]]:
    """Return the rows of every table of a page that has this header, without marks of code."""
    found, inside = [], False
    for line in page.read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split(" |")]
        cells = [cell.removeprefix("| ").strip() for cell in cells]
        if not line.startswith("|"):
            inside = False
        elif tuple(cells[: len(header)]) == header:
            inside = True
        elif inside and not line.startswith("|--"):
            found.append(cells)
    assert found, f"no table with {header} in {named(page)}"
    return found


FORMAT: Final = DOCS / "reference/table-format.md"


def test_the_page_of_the_format_has_every_header_word_where_it_is() -> None:
    on_page = {name: int(word) for word, name, *_ in rows(FORMAT, "word", "name")}
    in_code = {
        name.removeprefix("H_"): word
        for name, word in vars(layout).items()
        if name.startswith("H_")
    }
    assert on_page == in_code


def test_the_page_of_the_format_has_the_states() -> None:
    on_page = {name: int(value) for name, value, *_ in rows(FORMAT, "state", "value")}
    in_code = {
        name.removeprefix("STATE_"): value
        for name, value in vars(layout).items()
        if re.fullmatch(r"STATE_[A-Z]+", name) and isinstance(value, int)
    }
    assert on_page == in_code


def test_the_page_of_the_format_has_the_constants_of_the_code() -> None:
    for name, value, *_ in rows(FORMAT, "constant", "value"):
        places = [module for module in (layout, index, config) if hasattr(module, name)]
        assert int(value) == getattr(places[0], name), name


def test_the_page_of_the_format_draws_the_parts_where_they_are() -> None:
    """Header, rows, ctl, touch, arena, each from a page on."""
    table = layout.Layout(1 << 20, 512, 1024)
    assert table.rows_index * layout.WORD_BYTES == layout.PAGE_BYTES
    assert table.ctl_offset == layout.PAGE_BYTES + 8 * 512
    assert table.touch_offset == table.ctl_offset + 8 * 1024
    assert table.arena_offset == table.touch_offset + 8 * 1024
    assert layout.Layout.of_size(1 << 20, 512).slots_max == (1 << 20) // layout.MAP_BYTES_PER_SLOT


def words_of(block: bytes) -> list[int]:
    """Return a block's words."""
    whole = len(block) // layout.WORD_BYTES * layout.WORD_BYTES
    return list(memoryview(block[:whole]).cast("Q"))


def test_the_page_of_the_format_has_every_word_of_a_block_where_it_is() -> None:
    note = Note(ClientId(11, 12, 13), 14, 15)
    payload = b"payload "
    session = record.encode_session(
        lsn=1,
        slot=2,
        note=note,
        created_lsn=3,
        owner=Owner(4, 5, 6),
        written_ns=7,
        expires_ns=8,
        payload=payload,
    )
    outcome = record.encode_outcome(lsn=1, slot=2, note=note, result=1)
    shared = {
        "lsn": 1,
        "who": 13 << 32 | 11,
        "start_ticks": 12,
        "number": 14,
        "deadline_ns": 15,
    }
    of_session = {
        **shared,
        "place": 2 << 32 | len(session),
        "kind": record.KIND_SESSION,
        "created_lsn": 3,
        "owner_pid": 4,
        "owner_ticks": 5,
        "owner_inode": 6,
        "written_ns": 7,
        "expires_ns": 8,
        "checksum": words_of(session)[13],
        "payload": int.from_bytes(payload, "little"),
    }
    of_outcome = {
        **shared,
        "place": 2 << 32 | len(outcome),
        "kind": record.KIND_OUTCOME | 1 << 8,
        "checksum": words_of(outcome)[7],
    }
    table = rows(FORMAT, "word", "SESSION", "OUTCOME")
    assert [int(word) for word, *_ in table] == list(range(len(table)))
    assert [of_session[name] for _, name, *_ in table] == words_of(session)
    assert [of_outcome[name] for _, _, name, *_ in table if name] == words_of(outcome)


def test_the_page_of_the_format_has_every_word_of_a_batch_where_it_is() -> None:
    note = Note(ClientId(11, 12, 13), 14, 15)
    answer = b"answered"
    batch = record.encode_batch(lsn=1, note=note, row=2, items=[Item(3, 4, 5)], payload=answer)
    of_batch = {
        "lsn": 1,
        "place": ((1 << 32) - 1) << 32 | len(batch),
        "kind": 3,
        "who": 13 << 32 | 11,
        "start_ticks": 12,
        "number": 14,
        "deadline_ns": 15,
        "row": 2,
        "items_count": 1,
        "checksum": words_of(batch)[9],
        "slot": 3,
        "before": 4,
        "after": 5,
        "answer": int.from_bytes(answer, "little"),
    }
    table = rows(FORMAT, "word", "BATCH")
    assert [int(word) for word, *_ in table] == list(range(len(table)))
    assert [of_batch[name] for _, name, *_ in table] == words_of(batch)


ENVIRONMENT: Final = DOCS / "reference/environment.md"


def test_the_page_of_the_environment_has_every_variable_and_its_default() -> None:
    on_page = {variable: default for variable, default, *_ in rows(ENVIRONMENT, "variable")}
    handle = {"owned": 1, "timeout_s": config.TIMEOUT_S, "cache_max_count": config.CACHE_MAX_COUNT}
    assert handle.keys() == settings._HANDLE.keys()
    defaults = {**handle, **{name: getattr(StoreOptions(), name) for name in settings._STORE}}
    in_code = {f"SHMSTORE_{name.upper()}": str(default) for name, default in defaults.items()}
    elsewhere = {"SHMSTORE_DIR", "SHMSTORE_PYTHON", "SHMSTORE_NAME"}
    assert on_page.keys() == in_code.keys() | elsewhere
    assert {name: on_page[name] for name in in_code} == in_code


def test_every_variable_that_is_read_is_on_the_page() -> None:
    on_page = {variable for variable, *_ in rows(ENVIRONMENT, "variable")}
    in_code: set[str] = set()
    for path in (ROOT / "shmstore").rglob("*.py"):
        in_code |= set(re.findall(r'"(SHMSTORE_[A-Z_]*[A-Z])"', path.read_text()))
    assert in_code <= on_page


def test_the_page_of_the_environment_has_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHMSTORE_DIR", raising=False)
    default = {variable: text for variable, text, *_ in rows(ENVIRONMENT, "variable")}
    pattern = re.escape(default["SHMSTORE_DIR"]).replace("EUID", r"\d+")
    assert re.fullmatch(pattern, str(paths.default_directory()))


def test_the_page_of_the_command_line_has_every_command_and_option() -> None:
    page = DOCS / "reference/cli.md"
    on_page = {option for option, *_ in rows(page, "option")}
    assert isinstance(cli, click.Group)
    in_code = {
        option
        for command in cli.commands.values()
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for option in parameter.opts
    }
    assert on_page == in_code
    listed = {command.split()[1] for command, *_ in rows(page, "command")}
    assert listed == cli.commands.keys()


def test_every_test_that_the_page_of_the_boundary_names_is_there() -> None:
    """A statement whose test was renamed or removed is a statement without one."""
    listed = rows(DOCS / "explanation/trust-boundary.md", "threat", "mechanism", "test")
    assert len(listed) > 30
    for threat, _, test in listed:
        file, _, name = test.partition(".")
        (found,) = ROOT.glob(f"tests/**/test_{file}.py")
        assert re.search(rf"(class|def) {name}", found.read_text()), f"{threat}: {test}"


def names_in(file: Path) -> set[str]:
    """Return the names of a file's tests, without `test_`, and those of their classes."""
    names: set[str] = set()
    for node in ast.parse(file.read_text()).body:
        name = getattr(node, "name", "")
        if isinstance(node, ast.ClassDef) and name.startswith("Test"):
            names.add(name)
            within = [part.name for part in node.body if isinstance(part, ast.FunctionDef)]
            names |= {f"{name}::{part.removeprefix('test_')}" for part in within}
        elif isinstance(node, ast.FunctionDef) and name.startswith("test_"):
            names.add(name.removeprefix("test_"))
    return names


def named_by(name: str, names: set[str]) -> set[str]:
    """Return what a name, or the beginning of one, may mean."""
    return {name} & names or {other for other in names if other.startswith(name)}


SAFETY: Final = DOCS / "safety.md"


def test_every_test_that_the_page_of_safety_names_is_there_and_is_one() -> None:
    """A hazard whose test was renamed or removed is a hazard without one."""
    listed = rows(SAFETY, "hazard", "mechanism", "test")
    assert len(listed) > 100
    for hazard, _, test in listed:
        stem, _, name = test.partition("::")
        (file,) = ROOT.glob(f"tests/**/test_{stem}.py")
        assert len(named_by(name, names_in(file))) == 1, f"{hazard}: {test}"


def test_the_page_of_safety_does_not_say_more_than_the_floors() -> None:
    """The explorations are at least as large as the page says."""
    orders = 2  # in which copies go: each case runs in both
    cases = [*interleavings.CASES, *interleavings.IN_HASTE, *interleavings.FENCED]
    cases += [*batches.BATCHES, *batches.IN_HASTE]
    floors = [
        sum(floor.points for floor in crashes.FLOORS),
        sum(floor.nested for floor in crashes.FLOORS),
        orders * sum(case.schedules_min for case in cases),
        len(crash_mutants.MUTANTS) + len(crash_mutants.ENDS) + len(mutants.MUTANTS),
    ]
    on_page = [int(count) for _, count in rows(SAFETY, "what each run explores at least", "count")]
    assert all(page <= floor for page, floor in zip(on_page, floors, strict=True)), floors


def test_the_page_of_the_api_has_every_error_and_what_else_it_is() -> None:
    on_page: dict[str, str] = {}
    for names, also in rows(DOCS / "reference/api.md", "error", "also"):
        on_page |= dict.fromkeys(names.split(", "), also)
    in_code = {
        name: error.__bases__[1].__name__
        for name, error in vars(errors).items()
        if inspect.isclass(error) and issubclass(error, errors.ShmStoreError)
        if error is not errors.ShmStoreError
    }
    assert on_page == in_code
