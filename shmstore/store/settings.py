"""What an open may be told: by argument, else by environment, else by default.

Two kinds. A store's options are fixed by whoever starts it, and every later open that names one
has to name the same; a handle's settings are its own.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import UNSET

from shmstore import config
from shmstore._os.paths import StorePaths, store_paths
from shmstore._table import header
from shmstore.errors import StoreOptionsError
from shmstore.model import StoreOptions
from shmstore.store import codes, typed
from shmstore.wire.fields import DIRECTIONS, STATUSES

Seconds = float | int


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a handle was opened with; with it a pickled handle opens again.

    Attributes:
        name: The store's name.
        directory: Its directory.
        start: Whether this handle may start a manager.
        owned: Whether sessions created through it belong to this process unless told otherwise.
        timeout_s: Its calls' default deadline.
        cache_max_count: Decoded sessions that its reader keeps.
        named: The store's options that were named, by argument or environment.
        code_factory: What makes its codes; None: they are made of the store's alphabet.
        data_type: What its sessions' data are; None: mappings.

    """

    name: str
    directory: str
    start: bool
    owned: bool
    timeout_s: float
    cache_max_count: int
    named: dict[str, Any]
    code_factory: Callable[[], str] | None = None
    data_type: Any = None

    @property
    def paths(self) -> StorePaths:
        """The store's files."""
        return StorePaths(self.name, Path(self.directory))

    @property
    def options(self) -> StoreOptions:
        """The options that a manager started by this handle gets."""
        return StoreOptions(**self.named)

    def require_same(self, running: StoreOptions) -> None:
        """Refuse a running store that has other options than were named.

        Raises:
            StoreOptionsError: It has.

        """
        for option, wanted in self.named.items():
            found = getattr(running, option)
            if found != wanted:
                msg = (
                    f"store {self.name!r} runs with {option}={found!r}, and this open names "
                    f"{wanted!r}: leave it out to take what runs, or stop the store first"
                )
                raise StoreOptionsError(msg, option=option, running=found, wanted=wanted)


def settings_of(
    name: str,
    *,
    start: bool = True,
    directory: str | os.PathLike[str] | None = None,
    owned: bool | None = None,
    timeout_s: float | None = None,
    cache_max_count: int | None = None,
    code_factory: Callable[[], str] | None = None,
    data_type: Any = None,
    **options: object,
) -> Settings:
    """Return what an open with these options amounts to; nothing is touched.

    Args and errors are those of `shmstore.open`.
    """
    unknown = options.keys() - set(StoreOptions.__struct_fields__)
    if unknown:
        msg = f"a store has no option {', '.join(sorted(unknown))}"
        raise TypeError(msg)
    return resolve(
        store_paths(name, directory),
        start=start,
        owned=owned,
        timeout_s=timeout_s,
        cache_max_count=cache_max_count,
        options=options,
        code_factory=code_factory,
        data_type=data_type,
    )


def resolve(
    paths: StorePaths,
    *,
    start: bool,
    owned: bool | None,
    timeout_s: Seconds | None,
    cache_max_count: int | None,
    options: dict[str, object],
    code_factory: Callable[[], str] | None = None,
    data_type: Any = None,
) -> Settings:
    """Return the settings of one open; what an argument leaves out, the environment may give.

    Args:
        paths: The store's files.
        start: Whether the handle may start a manager.
        owned: None for not given.
        timeout_s: Likewise.
        cache_max_count: Likewise.
        options: The store's options; UNSET for not given.
        code_factory: What makes codes; None for the store's alphabet.
        data_type: What data are; None for mappings.

    Raises:
        TypeError: A value is of the wrong type.
        ValueError: A value is out of range, or an environment variable cannot be read as one.

    """
    given = {"owned": owned, "timeout_s": timeout_s, "cache_max_count": cache_max_count}
    handle = {
        name: _HANDLE[name](UNSET if value is None else value, name)
        for name, value in given.items()
    }
    named = {name: check(options.get(name, UNSET), name) for name, check in _STORE.items()}
    settings = Settings(
        name=paths.name,
        directory=str(paths.directory),
        start=start,
        owned=True if handle["owned"] is UNSET else handle["owned"],
        timeout_s=_or(handle["timeout_s"], config.TIMEOUT_S),
        cache_max_count=_or(handle["cache_max_count"], config.CACHE_MAX_COUNT),
        named={name: value for name, value in named.items() if value is not UNSET},
        code_factory=codes.check_factory(code_factory),
        data_type=data_type,
    )
    typed.typed_data(data_type)  # before a manager is started for it
    codes.require_possible(settings.options)
    header.declared_of(settings.options)  # here, and not in the manager, a mistake is explained
    return settings


def _or(value: Any, default: Any) -> Any:  # a setting of any type
    return default if value is UNSET else value


def _setting(
    read: Callable[[str], object], check: Callable[[object, str], object]
) -> Callable[[object, str], Any]:
    """Return a function from an argument (UNSET: not given) to the value in force, or UNSET."""

    def resolve_one(value: object, name: str) -> object:
        if value is not UNSET:
            return check(value, name)
        variable = f"SHMSTORE_{name.upper()}"
        text = os.environ.get(variable)
        if text is None:
            return UNSET
        try:
            return check(read(text), variable)
        except (TypeError, ValueError) as error:
            msg = f"the environment has {variable}={text!r}: {error}"
            raise ValueError(msg) from None

    return resolve_one


def _whole(low: int, high: int) -> Callable[[object, str], int]:
    def check(value: object, name: str) -> int:
        if type(value) is not int:
            msg = f"{name} is a whole number, not {value!r}"
            raise TypeError(msg)
        if not low <= value <= high:
            msg = f"{name} is from {low} to {high}, not {value}"
            raise ValueError(msg)
        return value

    return check


def _pages(value: object, name: str) -> int:
    size = _whole(config.MAP_SIZE_BYTES_MIN, config.MAP_SIZE_BYTES_MAX)(value, name)
    return -(-size // 4096) * 4096


def _seconds(*, least: float, none: bool = False) -> Callable[[object, str], float | None]:
    def check(value: object, name: str) -> float | None:
        if value is None and none:
            return None
        if isinstance(value, bool) or not isinstance(value, float | int):
            msg = f"{name} is a number of seconds, not {value!r}"
            raise TypeError(msg)
        if not (math.isfinite(value) and least <= value <= config.SECONDS_MAX):
            most = config.SECONDS_MAX
            msg = f"{name} is from {least:g} to {most:.0f} seconds, not {value!r}"
            raise ValueError(msg)
        return round(value * 1e9) / 1e9  # as the header keeps it, so that the same is equal

    return check


def _names(built_in: tuple[str, ...]) -> Callable[[object, str], tuple[str, ...]]:
    def check(value: object, name: str) -> tuple[str, ...]:
        if not isinstance(value, tuple | list | set | frozenset) or not all(
            type(item) is str for item in value
        ):
            msg = f"{name} is a tuple of names, not {value!r}"
            raise TypeError(msg)
        for item in value:
            if re.fullmatch(config.DECLARED_NAME_PATTERN, item) is None:
                msg = f"{name} is a tuple of names of 1 to 32 of a-z 0-9 _ -, not {value!r}"
                raise ValueError(msg)
        return tuple(sorted(set(value) - set(built_in)))  # so that the same is equal

    return check


def _read_names(text: str) -> tuple[str, ...]:
    return tuple([name.strip() for name in text.split(",")])


def _truth(value: object, name: str) -> bool:
    if type(value) is not bool:
        msg = f"{name} is True or False, not {value!r}"
        raise TypeError(msg)
    return value


def _read_truth(text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in words:
        msg = "use 1 or 0"
        raise ValueError(msg)
    return words[text.lower()]


def _read_seconds(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


check_timeout: Final = _seconds(least=config.TIMEOUT_S_MIN)
check_age: Final = _seconds(least=0.0)

_HANDLE: Final[dict[str, Callable[[object, str], Any]]] = {
    "owned": _setting(_read_truth, _truth),
    "timeout_s": _setting(float, check_timeout),
    "cache_max_count": _setting(int, _whole(0, config.CACHE_COUNT_MAX)),
}
_STORE: Final[dict[str, Callable[[object, str], Any]]] = {
    "map_size_bytes": _setting(int, _pages),
    "max_session_bytes": _setting(
        int, _whole(config.MAX_SESSION_BYTES_MIN, config.MAX_SESSION_BYTES_MAX)
    ),
    "unowned_max_age_s": _setting(_read_seconds, _seconds(least=config.TIMEOUT_S_MIN, none=True)),
    "idle_timeout_s": _setting(float, _seconds(least=0.0)),
    "sweep_interval_s": _setting(float, _seconds(least=config.SWEEP_INTERVAL_S_MIN)),
    "statuses": _setting(_read_names, _names(STATUSES)),
    "directions": _setting(_read_names, _names(DIRECTIONS)),
    "code_length": _setting(int, _whole(1, config.CODE_MAX_BYTES)),
    "alphabet": _setting(str, codes.check_alphabet),
}
assert set(_STORE) == set(StoreOptions.__struct_fields__)
