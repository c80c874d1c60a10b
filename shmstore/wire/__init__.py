"""The wire: frames and messages, without a socket.

Rules: bytes in, messages out; no input or output, no clock. What comes from the other end is
measured before memory is taken for it, and typed before it is believed.
"""
