"""The HTTP service of `clipmill serve`: its API, its page, its limits and its metrics."""
