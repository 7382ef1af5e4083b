"""How long work says how far it is.

Knows nothing of who listens.
"""

from collections.abc import Callable

# Called with a stage's name, and how many of how many steps are done; 0 of 0 for a stage that does
# not count.
OnProgress = Callable[[str, int, int], None]
