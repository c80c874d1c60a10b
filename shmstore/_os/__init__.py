"""Everything that asks the kernel: files and maps, processes and their identity, locks, clocks.

Rules: capabilities are probed, never inferred from a platform's name; and what cannot be found out
is said to be unknown, never guessed.
"""
