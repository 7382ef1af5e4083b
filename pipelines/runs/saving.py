"""The store's record of its runs: a report page and its numbers for each.

Knows nothing of what a run does.
"""

import dataclasses
import json
from collections.abc import Sequence

from pipelines.runs.report import RunReport
from pipelines.runs.report_page import QuerySheet, render_page
from pipelines.store import Store


def save_report(report: RunReport, *, store_uri: str, sheets: Sequence[QuerySheet] = ()) -> str:
    """Write `report.json` and `report.html` into the store; returns the page's full path.

    Args:
        report: Of a run.
        store_uri: The store as it was given; the report's own lacks what may be secret.
        sheets: Queries and their answers, for the page.
    """
    store = Store(store_uri)
    folder = f"runs/{report.run_id}"
    numbers = json.dumps(dataclasses.asdict(report), indent=1) + "\n"
    store.publish(f"{folder}/report.json", numbers.encode())
    store.publish(f"{folder}/report.html", render_page(report, sheets=sheets).encode())
    return store.full_path(f"{folder}/report.html")
