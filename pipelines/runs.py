"""The store's record of its runs: a report page and its numbers for each.

Knows nothing of what a run does.
"""

import dataclasses
import json
from collections.abc import Sequence

from pipelines.lineage import public_uri
from pipelines.report import RunReport
from pipelines.report_page import QuerySheet, render_page
from pipelines.store import Store


def save_report(report: RunReport, *, sheets: Sequence[QuerySheet] = ()) -> str:
    """Write `report.json` and `report.html` into the store; returns the page's full path.

    What its URIs hold of users, passwords and tokens is not written.
    """
    store = Store(report.store_uri)
    report = dataclasses.replace(
        report,
        catalog_uri=public_uri(report.catalog_uri),
        store_uri=public_uri(report.store_uri),
    )
    folder = f"runs/{report.run_id}"
    numbers = json.dumps(dataclasses.asdict(report), indent=1) + "\n"
    store.publish(f"{folder}/report.json", numbers.encode())
    store.publish(f"{folder}/report.html", render_page(report, sheets=sheets).encode())
    return store.full_path(f"{folder}/report.html")
