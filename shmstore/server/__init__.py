"""The manager: the process that hosts the table and is its only writer.

`python -m shmstore.server` is started by exec, never by import. Neither pickle nor multiprocess is
loaded here: nothing that a client sends is ever executed.
"""
