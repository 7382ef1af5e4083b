"""Ports of this machine for servers that bind them later."""

import random
import socket

# Below what systems give to who asks for any, as Ray's processes do all the time.
_FIRST, _LAST = 20_000, 30_000


def free_port() -> int:
    """One that nobody has, nor is given."""
    while True:
        port = random.SystemRandom().randint(_FIRST, _LAST)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        return port
