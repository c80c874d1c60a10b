"""The code base itself: what no tool of the others checks, and what must not creep in.

After TigerBeetle's tidy test.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest

from shmstore import config

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[1]
PACKAGE: Final = ROOT / "shmstore"

TOP_LEVEL: Final = {"pyproject.toml", "README.md", "LICENSE"} | {
    *("shmstore", "tests", "benchmarks", "docs", ".ci", ".gitignore")
}

LONG_MODULES: Final = {
    "aio/proxy.py": "all that may come between a call and its answer, in the order of a call",
    "aio/writes.py": "a method for each write of the store, with all the same parameters",
    "_table/reader.py": "one probe and one copy, whose parts a reader must see side by side",
    "_table/writer.py": "the write order and all that it is made of, in one place",
    "model.py": "one public struct after the other: more docstring than code",
    "operations/meaning.py": "one short function for each operation",
    "proxy.py": "one exchange, and all that can go wrong in it",
    "server/host.py": "whatever changes the table, in one place",
    "server/loop.py": "what a client may do, and what comes of it",
    "store/batch.py": "a signature for each write, as the store's own",
    "store/watching.py": "one watcher, and all that can happen to it",
    "store/writes.py": "the public writes: more docstring than code",
    "wire/messages.py": "every message there is, side by side",
    "_table/record.py": "three kinds of block side by side, as its head draws them",
    "_table/recovery.py": "one step after the other, as its head says",
    "watcher.py": "one lock's state, and all that touches it",
    "store/session_store.py": "the public class: more docstring than code",
}
MODULE_LINES_MAX: Final = 300

PURE: Final = ("operations", "wire", "_table")
IMPURE: Final = frozenset({"os", "mmap", "time", "threading", "socket", "psutil"})

MAY_SLEEP: Final = frozenset({"until"})
"""Functions in which a sleep is the pause of a wait that has a condition and a deadline."""


class Source(NamedTuple):
    """One file of Python."""

    name: str
    text: str
    tree: ast.Module

    def functions(self) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
        """Yield every function of it, nested ones too."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield node


def sources(*places: Path) -> list[Source]:
    """Return the Python files of these places, named from the root."""
    found = []
    for place in places:
        for path in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            text = path.read_text()
            found.append(Source(str(path.relative_to(ROOT)), text, ast.parse(text)))
    return found


OURS: Final = sources(PACKAGE)
EVERYTHING: Final = sources(*(p for p in map(ROOT.joinpath, TOP_LEVEL) if p.is_dir()))


def test_the_top_level_has_what_the_design_says_and_nothing_else() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a clone: whatever else is here, git cannot say what belongs")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607  # of this machine
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert {line.split("/")[0] for line in listed.splitlines()} <= TOP_LEVEL


def test_no_word_is_stored_by_pack_into() -> None:
    """It zeroes the field first, and readers see a value that nobody wrote."""
    named = [
        f"{source.name}:{node.lineno}"
        for source in OURS
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Attribute) and node.attr == "pack_into"
    ]
    assert not named


def imported(source: Source) -> set[str]:
    """Return the names of all modules that a file imports, those for type checking left out."""
    checking_only = {
        inner
        for node in ast.walk(source.tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    modules: set[str] = set()
    for node in ast.walk(source.tree):
        if node in checking_only:
            continue
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.update(f"{node.module}.{alias.name}" for alias in node.names)
    return modules


def test_what_is_pure_imports_neither_clock_nor_kernel() -> None:
    """Or interleavings and crash points could not be played through in one process."""
    wrong = [
        f"{source.name} imports {module}"
        for source in sources(*(PACKAGE / place for place in PURE))
        for module in imported(source)
        if module.split(".")[0] in IMPURE or module.startswith("shmstore._os")
    ]
    assert not wrong


SUPPRESSION: Final = re.compile(r"\s*(?:noqa\b|type:\s*ignore\b)")


def without_reason(text: str) -> Iterator[int]:
    """Yield the numbers of the lines that suppress something and do not say why.

    The reason is a comment of its own, behind the last suppression of its line.
    """
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            parts = token.string.split("#")[1:]
            suppressing = [bool(SUPPRESSION.match(part)) for part in parts]
            if any(suppressing) and (suppressing[-1] or not re.search(r"\w", parts[-1])):
                yield token.start[0]


def test_every_suppression_has_its_reason_behind_it() -> None:
    wrong = [
        f"{source.name}:{number}" for source in EVERYTHING for number in without_reason(source.text)
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("line", "is_wrong"),
    [
        ("x = 1  # noqa: S603", True),
        ("x = 1  # noqa", True),
        ("x = 1  # noqa: S603, S607", True),
        ("x = 1  # noqa: S603 our own program", True),
        ("x = 1  # a reason that comes first  # noqa: S603", True),
        ("x = 1  # noqa: S603  # our own program", False),
        ("x = 1  # noqa: S603, S607  # our own program", False),
        ("x = 1  # type: ignore[misc]", True),
        ("x = 1  # type: ignore[misc, arg-type]  # no types there", False),
        ("x = 1  # type: ignore", True),
        ("x = 1  # type: ignore[misc]  # noqa: S603  # our own program", False),
        ("x = '# noqa'", False),
        ("x = 1  # nothing of the kind", False),
    ],
)
def test_a_suppression_without_a_reason_is_found(line: str, *, is_wrong: bool) -> None:
    assert bool(list(without_reason(line))) == is_wrong


def test_nothing_is_left_to_do_in_a_comment() -> None:
    word = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HA" + r"CK)\b")
    wrong = [
        f"{source.name}:{number}"
        for source in EVERYTHING
        for number, line in enumerate(source.text.splitlines(), 1)
        if word.search(line)
    ]
    assert not wrong


def is_sleep(node: ast.AST) -> bool:
    """Say whether this is a call of something named sleep."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    return (isinstance(called, ast.Attribute) and called.attr == "sleep") or (
        isinstance(called, ast.Name) and called.id == "sleep"
    )


def test_no_test_sleeps() -> None:
    """A wait is until a condition holds, with a deadline."""
    wrong = []
    for source in sources(ROOT / "tests"):
        allowed = {
            inner
            for function in source.functions()
            if function.name in MAY_SLEEP
            for inner in ast.walk(function)
        }
        wrong += [
            f"{source.name}:{node.lineno}"
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Call) and is_sleep(node) and node not in allowed
        ]
    assert not wrong


def test_modules_are_short_or_say_why_not() -> None:
    long = {
        source.name.removeprefix("shmstore/")
        for source in OURS
        if len(source.text.splitlines()) > MODULE_LINES_MAX
    }
    assert not long - LONG_MODULES.keys(), "split them, or give the reason"
    assert not LONG_MODULES.keys() - long, "short by now: take them off the list"


def code_lines(source: Source, function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return how many lines of code a function's body has: no docstring, comment or empty line."""
    body = function.body
    if ast.get_docstring(function, clean=False) is not None:
        body = body[1:]
    if not body:
        return 0
    lines = source.text.splitlines()[body[0].lineno - 1 : function.end_lineno]
    return sum(1 for line in lines if line.strip() and not line.strip().startswith("#"))


def test_functions_do_one_thing() -> None:
    """Half of them under 8 lines, nine in ten under 30."""
    lengths = sorted(
        (code_lines(source, function), f"{source.name}: {function.name}")
        for source in OURS
        for function in source.functions()
    )
    assert lengths[len(lengths) // 2] < (8, "")
    assert lengths[len(lengths) * 9 // 10] < (30, ""), lengths[-len(lengths) // 10 :]


def test_every_limit_has_its_reason() -> None:
    """A constant of config is followed by its docstring, and its name ends with its unit."""
    (source,) = sources(PACKAGE / "config.py")
    body = source.tree.body
    without = []
    for node, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            said = following.value if isinstance(following, ast.Expr) else None
            if not (isinstance(said, ast.Constant) and isinstance(said.value, str)):
                without.append(node.target.id)
    assert not without
    assert len([name for name in vars(config) if name.isupper()]) > len(without)


def test_every_ignored_rule_has_its_reason() -> None:
    """In pyproject.toml too: a rule that is off says why on its line."""
    text = (ROOT / "pyproject.toml").read_text()
    lint = tomllib.loads(text)["tool"]["ruff"]["lint"]
    ignored = [*lint["ignore"], *(c for codes in lint["per-file-ignores"].values() for c in codes)]
    wrong = [
        line
        for line in text.splitlines()
        if (found := re.match(r'\s*"([A-Z]+[0-9]+)",', line))
        and found[1] in ignored
        and not re.search(r"#\s*\w", line)
    ]
    assert not wrong
