"""What a person sees of a run: the page (`page`), and the summary that Prefect shows (`summary`).

Both tell the same numbers (`figures`) and show images chosen the same way (`showcase`).
"""

from tasks.report.contact_sheet import contact_sheet
from tasks.report.page import write_report
from tasks.report.summary import summarize, summary_markdown

__all__ = ["contact_sheet", "summarize", "summary_markdown", "write_report"]
