"""How many streams a card takes from a process at once.

Knows nothing of what they do.
"""

import os

_MAX_CHANNELS = 32


def use_all_channels() -> None:
    """Give this process all channels of its cards; without effect once CUDA has started.

    Streams that share a channel wait for each other, and CUDA by itself has 8 channels, while each
    nvJPEG has 14 streams.
    """
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", str(_MAX_CHANNELS))
