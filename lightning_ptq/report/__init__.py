"""What a run did: collected, printed, drawn, and written as JSON, CSV, PNG and one HTML page."""

from lightning_ptq.report.ptq_report import PTQReport
from lightning_ptq.report.table import Sheet

__all__ = ["PTQReport", "Sheet"]
