"""The Ray cluster at hand: its nodes and GPUs, room for workers, and the wait for it."""
