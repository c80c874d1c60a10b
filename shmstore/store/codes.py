"""Codes that are made up: of the store's length and alphabet, or by the handle's own factory.

A code has `code_length * log2(len(alphabet))` bits from the system's source of randomness: 40 with
8 characters of 32. At n live sessions a made-up code is taken with a chance of n in 2**bits, and
then another is made. Where codes are to be guessed by nobody, choose 128 bits: 26 characters of 32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shmstore import config
from shmstore.errors import SessionExistsError
from shmstore.wire.values import check_code

if TYPE_CHECKING:
    from collections.abc import Callable

    from shmstore.model import StoreOptions


def made_up(options: StoreOptions, factory: Callable[[], str] | None) -> str:
    """Return a code that is most likely not taken.

    Raises:
        TypeError: The factory returned no str.
        ValueError: It returned one that is no code.

    """
    if factory is not None:
        return check_code(factory())
    import secrets  # its imports are 10 ms that a reader need not pay

    return "".join([secrets.choice(options.alphabet) for _ in range(options.code_length)])


def all_taken(
    options: StoreOptions,
    factory: Callable[[], str] | None,
    last: SessionExistsError,
    sessions_count: int,
) -> SessionExistsError:
    """Return the error that says why no code could be made up, and what to do."""
    if factory is None:
        possible = f"of {len(options.alphabet)}**{options.code_length} possible ones"
        remedy = "start the store with a longer code_length or a larger alphabet"
    else:
        possible = "of what the code_factory makes"
        remedy = "have it make more different ones"
    msg = (
        f"{config.CODE_ATTEMPTS_MAX} codes made up in a row were taken, {last.code!r} at last: "
        f"there are {sessions_count} sessions, {possible}; {remedy}, or give a code"
    )
    return SessionExistsError(msg, code=last.code, owner_pid=last.owner_pid)


def check_alphabet(value: object, name: str) -> str:
    """Return an alphabet that is one.

    Raises:
        TypeError: Not a str.
        ValueError: Fewer than two characters, one of them twice, a NUL, or what is no UTF-8.

    """
    if type(value) is not str:
        msg = f"{name} is a str of the characters that codes are made of, not {value!r}"
        raise TypeError(msg)
    if len(set(value)) < config.CODE_CHARACTERS_MIN or len(set(value)) < len(value):
        msg = f"{name} is at least 2 characters, each once, not {value!r}"
        raise ValueError(msg)
    for character in value:
        check_code(character)
    return value


def check_factory(value: object) -> Callable[[], str] | None:
    """Return what was given if it can be called; what it returns is checked each time.

    Raises:
        TypeError: It cannot be called.

    """
    if value is not None and not callable(value):
        msg = f"code_factory is a callable that returns a str, or None, not {value!r}"
        raise TypeError(msg)
    return value


def require_possible(options: StoreOptions) -> None:
    """Refuse a length and an alphabet that do not go together.

    Raises:
        ValueError: A code could be longer than 255 bytes.

    """
    longest_bytes = options.code_length * max(len(c.encode()) for c in options.alphabet)
    if longest_bytes > config.CODE_MAX_BYTES:
        msg = (
            f"code_length is {options.code_length}, which with this alphabet makes codes of up to "
            f"{longest_bytes} bytes; a code has at most {config.CODE_MAX_BYTES}"
        )
        raise ValueError(msg)
