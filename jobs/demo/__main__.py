"""`python -m jobs.demo`: the same as `clipmill demo`.

Knows nothing else.
"""

import sys

from jobs.command import run
from jobs.demo.run import main

run(main, sys.argv[1:])
