"""The table: words, layout, records, arena, index, and who writes, reads and verifies them.

Rules: pure functions over a buffer that is handed in. Nothing here imports os, mmap, time,
threading, socket or psutil, which is what lets every interleaving and every crash point be
replayed within one process.
"""
