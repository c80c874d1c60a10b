"""Options and settings: by argument, else by environment, else by default; checked alike."""

from __future__ import annotations

import pickle
import re
from typing import TYPE_CHECKING, Any

import pytest
from msgspec import UNSET

from shmstore import config
from shmstore._os import paths
from shmstore.errors import StoreOptionsError
from shmstore.model import StoreOptions
from shmstore.store import settings as store_settings

if TYPE_CHECKING:
    from pathlib import Path

    from shmstore.store.settings import Settings

HANDLE = {
    "owned": (True, False, "0", False),
    "timeout_s": (config.TIMEOUT_S, 2, "2.5", 2.5),
    "cache_max_count": (config.CACHE_MAX_COUNT, 7, "8", 8),
}
"""Name: default, a value, a text, and the value that the text stands for."""

STORE = {
    "map_size_bytes": (config.MAP_SIZE_BYTES, 1 << 21, "2097152", 1 << 21),
    "max_session_bytes": (config.MAX_SESSION_BYTES, 1000, "1001", 1001),
    "unowned_max_age_s": (config.UNOWNED_MAX_AGE_S, None, "none", None),
    "idle_timeout_s": (config.IDLE_TIMEOUT_S, 0, "0", 0.0),
    "sweep_interval_s": (config.SWEEP_INTERVAL_S, 0.01, "0.5", 0.5),
    "code_length": (config.CODE_LENGTH, 1, "26", 26),
    "alphabet": (config.CODE_ALPHABET, "01", "aäß", "aäß"),
    "statuses": ((), ("queued", "running"), "running, queued", ("queued", "running")),
    "directions": ((), ("in",), "out,in", ("in", "out")),
}
NO_NUMBERS = ("alphabet", "statuses", "directions")
"""Of which most texts are a value."""


@pytest.fixture(autouse=True)
def _no_environment(store_dir: Path) -> None:
    assert store_dir.exists()


def resolve(**given: Any) -> Settings:
    """Resolve what an open of a store 't' gives."""
    return store_settings.resolve(
        paths.store_paths("t"),
        start=True,
        **{name: given.pop(name, None) for name in HANDLE},
        options=given,
    )


def in_force(settings: Settings, name: str) -> Any:
    """Return the value in force of a setting or an option."""
    return getattr(settings if name in HANDLE else settings.options, name)


@pytest.mark.parametrize("name", [*HANDLE, *STORE])
class TestEach:
    """Every setting."""

    def test_default(self, name: str) -> None:
        """Given nowhere it is the default, and an option is not named."""
        settings = resolve()
        assert in_force(settings, name) == {**HANDLE, **STORE}[name][0]
        assert settings.named == {}

    def test_argument(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The argument wins over the environment."""
        value = {**HANDLE, **STORE}[name][1]
        monkeypatch.setenv(f"SHMSTORE_{name.upper()}", "nonsense")
        settings = resolve(**{name: value})
        assert in_force(settings, name) == value
        assert settings.named == ({name: value} if name in STORE else {})

    def test_environment(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The environment serves where there is no argument; an option is named by it."""
        _, _, text, value = {**HANDLE, **STORE}[name]
        monkeypatch.setenv(f"SHMSTORE_{name.upper()}", text)
        settings = resolve()
        assert in_force(settings, name) == value
        assert settings.named == ({name: value} if name in STORE else {})

    @pytest.mark.parametrize("text", ["non sense", "", "-1", "nan"])
    def test_environment_that_cannot_be_read(
        self, name: str, text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error names the variable and what it holds."""
        if name in NO_NUMBERS:
            text = {"alphabet": "A" + text + "A"}.get(name, "queued," + text * 33)
        monkeypatch.setenv(f"SHMSTORE_{name.upper()}", text)
        with pytest.raises(ValueError, match=f"SHMSTORE_{name.upper()}='{text}'"):
            resolve()

    @pytest.mark.parametrize("value", ["1", b"1", [1], 1j])
    def test_of_the_wrong_type(self, name: str, value: Any) -> None:
        """An argument of the wrong type is a TypeError that names it."""
        if name == "alphabet" and type(value) is str:
            value = None
        with pytest.raises(TypeError, match=f"^{name} is"):
            resolve(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout_s", 0),
        ("timeout_s", -1.0),
        ("timeout_s", float("inf")),
        ("timeout_s", float("nan")),
        ("cache_max_count", -1),
        ("map_size_bytes", 0),
        ("map_size_bytes", config.MAP_SIZE_BYTES_MIN - 1),
        ("map_size_bytes", config.MAP_SIZE_BYTES_MAX + 1),
        ("max_session_bytes", 63),
        ("unowned_max_age_s", 0),
        ("idle_timeout_s", -0.1),
        ("sweep_interval_s", 0.0),
        ("sweep_interval_s", 1e300),
        ("code_length", 0),
        ("code_length", 256),
        ("alphabet", ""),
        ("alphabet", "AAAA"),
        ("alphabet", "ABCA"),
        ("statuses", ("",)),
        ("statuses", ("Queued",)),
        ("statuses", ("x" * 33,)),
        ("directions", ("in", "o ut")),
        ("directions", ("in\n",)),
    ],
)
def test_out_of_range(name: str, value: Any) -> None:
    """A value out of range is a ValueError that names the setting and the value."""
    shown = repr(value) if name in NO_NUMBERS else str(value)
    with pytest.raises(ValueError, match=rf"^{name} is.*{re.escape(shown)}"):
        resolve(**{name: value})


@pytest.mark.parametrize(
    "name", ["timeout_s", "cache_max_count", "map_size_bytes", "sweep_interval_s"]
)
def test_truth_is_no_number(name: str) -> None:
    """True is no number of anything."""
    with pytest.raises(TypeError, match=f"^{name} is"):
        resolve(**{name: True})


@pytest.mark.parametrize("text", ["1", "true", "YES", "0", "False", "no"])
def test_words_for_truth(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The usual words, in any case."""
    monkeypatch.setenv("SHMSTORE_OWNED", text)
    assert resolve().owned is (text.lower() in {"1", "true", "yes"})


@pytest.mark.parametrize("alphabet", ["A\0", "A\ud800"])
def test_characters_that_no_code_has(alphabet: str) -> None:
    """An alphabet has what a code may have: no NUL, no half of a surrogate pair."""
    with pytest.raises(ValueError, match=r"^a code"):
        resolve(alphabet=alphabet)


@pytest.mark.parametrize(
    ("alphabet", "longest"), [("AB", 255), ("äb", 127), ("\N{CRAB}b", 63), ("b\N{CRAB}", 63)]
)
def test_codes_that_would_be_too_long(alphabet: str, longest: int) -> None:
    """A code of the widest characters has at most 255 bytes."""
    assert resolve(alphabet=alphabet, code_length=longest).options.code_length == longest
    with pytest.raises(
        ValueError, match=f"^code_length is {longest + 1}" if longest < 255 else "."
    ):
        resolve(alphabet=alphabet, code_length=longest + 1)


def test_declared_names_are_a_set() -> None:
    """Order, repetition and built-in names make no other store."""
    wanted = resolve(statuses=("b", "a")).options
    assert resolve(statuses=["a", "pending", "b", "a"]).options == wanted
    assert wanted.statuses == ("a", "b")
    assert resolve(directions={"send"}).named == {"directions": ()}


def test_what_does_not_fit_into_the_header() -> None:
    """A hundred of the longest names and more are refused where they are given."""
    names = tuple(f"{number:032}" for number in range(200))
    with pytest.raises(ValueError, match=r"take \d+ bytes together, and .* has \d+"):
        resolve(statuses=names)
    assert len(resolve(statuses=names[:100]).options.statuses) == 100


def test_what_cannot_be_called_makes_no_codes() -> None:
    """A code_factory is a callable."""
    wrong: Any = "A"
    with pytest.raises(TypeError, match=r"^code_factory is a callable"):
        store_settings.settings_of("t", code_factory=wrong)


def test_map_sizes_are_whole_pages() -> None:
    """A size is rounded up to pages, so two spellings of one size are the same."""
    assert resolve(map_size_bytes=(1 << 20) + 1).options.map_size_bytes == (1 << 20) + 4096
    assert resolve(map_size_bytes=1 << 20).options.map_size_bytes == 1 << 20


def test_what_runs_has_to_be_the_same() -> None:
    """Only what was named is compared, and the error has both values."""
    running = StoreOptions(idle_timeout_s=5.0, max_session_bytes=100)
    resolve().require_same(running)
    resolve(idle_timeout_s=5).require_same(running)
    with pytest.raises(
        StoreOptionsError, match=r"runs with idle_timeout_s=5\.0.*names 6\.0"
    ) as caught:
        resolve(idle_timeout_s=6, max_session_bytes=100).require_same(running)
    error = caught.value
    assert (error.option, error.running, error.wanted) == ("idle_timeout_s", 5.0, 6.0)


def test_unset_is_not_given() -> None:
    """An option that is UNSET is not named."""
    assert resolve(idle_timeout_s=UNSET).named == {}


def test_pickle() -> None:
    """Settings survive pickle: a handle opens again by them."""
    settings = resolve(timeout_s=2, unowned_max_age_s=None)
    again = pickle.loads(pickle.dumps(settings))  # noqa: S301  # our own
    assert again == settings
    assert again.paths == settings.paths
