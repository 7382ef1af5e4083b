"""Ports of this machine for servers that bind them later."""

import random
import socket

# Between those of Ray's workers and those that Linux gives to who asks for any.
_FIRST, _LAST = 20_000, 32_000


def free_port() -> int:
    """One that nobody has."""
    anyhow = random.SystemRandom()  # Hypothesis seeds the other one
    while True:
        port = anyhow.randint(_FIRST, _LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
