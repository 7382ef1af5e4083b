"""Saves the report of a run that is over: what went well is not called a failure for want of it.

Knows nothing of what is in a report.
"""

import sys

from pipelines.errors import StoreError
from pipelines.report import RunReport
from pipelines.runs import save_report


def saved_report(report: RunReport, *, store_uri: str) -> str | None:
    """Save a report in a store; returns its page's path, or says on stderr why there is none."""
    try:
        return save_report(report, store_uri=store_uri)
    except StoreError as error:
        print(
            f"clipmill: snapshot {report.snapshot} is committed; only its report is missing: "
            f"{error}",
            file=sys.stderr,
        )
        return None
