"""The record of a run, printed, drawn, judged, and written as JSON, CSV, PNG and one HTML page; and the preflight."""

from lightning_ptq.report.ptq_report import PTQReport
from lightning_ptq.report.table import ReportTable

Sheet = ReportTable
"""Former name of :class:`ReportTable`."""

__all__ = ["PTQReport", "ReportTable", "Sheet"]
