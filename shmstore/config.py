"""Every limit and default, each with its unit and its reason."""

from __future__ import annotations

from typing import Final

NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""A store's name is a file name on every system, and never hidden or a path."""

CODE_MAX_BYTES: Final = 255
"""A code's length in UTF-8. One byte of length, as in most key formats; chosen arbitrarily."""

CODE_ALPHABET: Final = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
"""No 0/O, no 1/I: 32 characters that a person can read out over a telephone; 5 bits each."""

CODE_LENGTH: Final = 8
"""40 bits: at a million live sessions one made-up code in a million collides, and is made again."""

CODE_CHARACTERS_MIN: Final = 2
"""Different ones in an alphabet: of one character only one code can be made."""

DECLARED_NAME_PATTERN: Final = r"[a-z0-9_-]{1,32}"
"""A declared status or direction: what looks the same to everybody, in a log and in an address."""

CODE_ATTEMPTS_MAX: Final = 64
"""Collisions in a row before create gives up: never met unless nearly all codes are taken."""

MAP_SIZE_BYTES: Final = 1 << 30
"""As LMDB's map_size: an upper bound, not a cost. The file is sparse; pages come with use."""

MAP_SIZE_BYTES_MIN: Final = 1 << 20
"""Header, rows, control words, and the lines that deletes are always left, with room to work."""

MAP_SIZE_BYTES_MAX: Final = 1 << 34
"""28 bits of 64-byte lines: 16 GiB."""

MAX_SESSION_BYTES: Final = 16 << 20
"""The encoded size of one session. A larger value belongs in a file; its path in the session."""

MAX_SESSION_BYTES_MIN: Final = 64
"""Less than any session has: a lower limit could only be a mistake of units."""

MAX_SESSION_BYTES_MAX: Final = 1 << 30
"""The most that may be chosen: a length in a block's head has 32 bits, and a quarter is enough."""

CACHE_COUNT_MAX: Final = 1 << 31
"""The most that may be chosen; no memory holds as many."""

SECONDS_MAX: Final = 100 * 365 * 24 * 3600.0
"""Of any time that may be chosen: 100 years of nanoseconds fit in a word."""

TIMEOUT_S_MIN: Final = 0.001
"""Of a call, and of an age: below it nothing could be done in time."""

SWEEP_INTERVAL_S_MIN: Final = 0.01
"""A sweep of many owners takes about as long."""

TTL_S_MIN: Final = 0.001
"""Of a session's time to live: it is over before its answer has arrived."""

UNOWNED_MAX_AGE_S: Final = 24 * 3600.0
"""How long a session without owner lives after its last write: nobody's death would end it."""

IDLE_TIMEOUT_S: Final = 60.0
"""How long a manager without connection and session stays: longer than any restart of workers."""

SWEEP_INTERVAL_S: Final = 60.0
"""The net under the events; nothing should ever be found by it, so it may be rare."""

TIMEOUT_S: Final = 5.0
"""The default deadline of a call: a manager under load answers in milliseconds."""

START_TIMEOUT_S: Final = 30.0
"""How long an open waits for a manager to start, whatever its calls' deadline: a cold disk."""

CACHE_MAX_COUNT: Final = 65_536
"""Decoded sessions that one reader keeps: some 64 MiB of typical ones."""

ROWS_COUNT: Final = 4096
"""Clients that can have a remembered outcome at once, hence clients that can write."""

CLIENTS_MAX: Final = ROWS_COUNT
"""Connections at once: as many as there are rows."""

READ_ATTEMPTS_MAX: Final = 64
"""Torn copies in a row before a read gives up. Each needs a write of that very code."""

PICTURE_ATTEMPTS_MAX: Final = 8
"""Tries for one instant's list before each session is taken as of some instant of the call."""

HEARTBEAT_S: Final = 2.0
"""How often an idle manager wakes: the most that an idle end, or a slow peer, can be late."""

POLL_MAX_S: Final = 3600.0
"""The longest single wait: poll counts milliseconds in 31 bits, and nothing waits so long."""

POLL_INTERVAL_S: Final = 0.5
"""How often owners that could get no descriptor are looked at."""

BATCH_MAX_COUNT: Final = 1 << 16
"""Items of one batch: the manager does nothing else meanwhile, for half a second at most."""

BATCH_COUNT: Final = 1000
"""Items of one request of a batch that need not be one: some 10 ms of the manager's time."""

BATCH_BYTES: Final = 1 << 20
"""Bytes of such a request, likewise."""

MODIFY_ATTEMPTS_MAX: Final = 100
"""Writes of others that modify meets in a row before it gives up."""

REMOVE_COUNT: Final = 128
"""Sessions that the manager deletes by itself before it looks who asks: some 2 ms of its time."""

FEED_MAX_COUNT: Final = 1 << 14
"""Events that a manager keeps for those who watch: a second of writes at full speed."""

FEED_MAX_BYTES: Final = 16 << 20
"""What the sessions in them may take, unless the last event alone takes more."""

FEED_PAUSE_S: Final = 0.002
"""How long events are gathered in a stream of writes: many then share one message."""

DESCRIPTORS_SPARE: Final = 16
"""Descriptors that clients and owners leave to the manager: to look into /proc it needs one, to
sweep a few, and what cannot be looked at cannot be served."""

DESCRIPTORS_EXPECTED: Final = 2 * CLIENTS_MAX
"""Room for so many is made at the start: all clients, and as many owners. It takes 64 KiB."""

SLOW_PEER_S: Final = 30.0
"""How long a peer may take over one frame, sent or received, before it is let go."""

RESERVE_CHUNK_BYTES: Final = 1 << 20
"""Pages reserved at a time: 256 of them; chosen arbitrarily."""

LSN_WARN: Final = 1 << 35
"""Half of the LSNs are used: at 1,000 writes a second a year is left. Logged once."""

LSN_MAX: Final = (1 << 36) - (1 << 20)
"""Writes are refused from here on; the rest is for deletes."""

LISTEN_BACKLOG: Final = 1024
"""Clients that may wait to be accepted: a whole machine's workers reconnecting at once."""

RECV_BYTES: Final = 1 << 16
"""The most that is taken from one peer at a time. Twice as much, and malloc maps and unmaps memory
for each call, which costs more than all the rest of it."""

LOG_MAX_BYTES: Final = 1 << 20
"""A log file is set aside at this size; the one before it is dropped."""

PIN_MAX_S: Final = 10.0
"""How long a client may take over the copy of a picture before the manager uses the lines again."""

QUARANTINE_MAX_BYTES: Final = 64 << 20
"""Of damaged records that are kept for people; what comes after is only logged."""

HUNG_S: Final = 10.0
"""How long a manager's heartbeat may stand still, by its supervisor's clock, before it is replaced:
five heartbeats, and longer than any request takes."""

RESTARTS_MAX: Final = 50
"""Restarts within RESTARTS_WITHIN_S; more, and the supervisor pauses before each: something kills
its managers faster than they can be of use."""

RESTARTS_WITHIN_S: Final = 5.0
"""See RESTARTS_MAX. Ten a second are a test, or a fault that a pause does not make worse."""

BACKOFF_MIN_S: Final = 0.1
"""The first pause; each one after it is twice as long."""

BACKOFF_MAX_S: Final = 5.0
"""The longest pause: as long as a writer waits by default."""

FRUITLESS_MAX: Final = 10
"""Managers in a row that died before their first answer: the eleventh would too."""

GIVE_UP_S: Final = 1.0
"""How long a supervisor that gives up tells waiting clients why, before it leaves."""

STALE_HEARTBEAT_S: Final = 6.0
"""Three heartbeats missed: list_active looks whether there is a manager at all."""
