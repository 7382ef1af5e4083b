"""The exceptions of the pipelines: ClipmillErrors, and ValueErrors of who asks an index.

Knows nothing of where they are raised.

    PipelineError
    ├── CatalogError             the catalog cannot be read, or its schema has faults (all listed)
    ├── StoreError               the store cannot be read or written, or holds something else
    │   └── CommitConflictError  another run committed the snapshot first
    ├── TooManyRejectsError      the share of rejected rows passed the stated bound
    ├── WorkerDeathError         workers died over the same work again and again
    ├── IncompleteRunError       the rows written are not the catalog's: nothing was committed
    ├── GuardError               a guard tripped: nothing was committed
    ├── PlacementError           the cluster gave workers no place in time
    ├── ScratchSpaceError        this machine has too little temporary space for a plan
    ├── RecallError              an index finds less than was asked for: it was not promoted
    └── IndexMissingError        there is no index to query yet

What one who asks an index can cause is a ValueError:

    QueryError
    ├── UnknownKeyError          a key was asked with that the index does not have
    └── UnknownColumnError       a column was filtered by that the index does not have
"""

from engine.errors import ClipmillError


class PipelineError(ClipmillError):
    """Base of the pipelines' errors."""


class CatalogError(PipelineError):
    """The catalog cannot be read, or its schema has faults."""


class StoreError(PipelineError):
    """The store cannot be read or written, or holds something else."""


class CommitConflictError(StoreError):
    """Another run committed this snapshot number first; nothing was changed."""


class TooManyRejectsError(PipelineError):
    """The share of rejected rows passed the stated bound; the rejects are saved."""


class WorkerDeathError(PipelineError):
    """Workers died over the same work again and again, and no single row is at fault."""


class IncompleteRunError(PipelineError):
    """The rows written are not exactly the catalog's rows, so nothing was committed."""


class GuardError(PipelineError):
    """What would have been committed is not like what was there: a guard tripped."""


class PlacementError(PipelineError):
    """The cluster gave workers no place in time; the text says what they waited for."""


class ScratchSpaceError(PipelineError):
    """This machine's temporary folder is full."""


class RecallError(PipelineError):
    """An index finds less than was asked for; it was not promoted."""


class IndexMissingError(PipelineError):
    """There is no index of the current snapshot to query."""


class QueryError(ValueError):
    """A query that cannot be asked, as whoever asks could have known."""


class UnknownKeyError(QueryError):
    """A key is not among those that are searched."""


class UnknownColumnError(QueryError):
    """A column is none that rows can be filtered by."""
