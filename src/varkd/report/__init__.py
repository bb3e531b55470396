"""From run folders to one page: tables, figures and the HTML that holds them. Never imports torch."""

from varkd.report.html import write_report
from varkd.report.tables import comparison_table, format_text_table

__all__ = ["comparison_table", "format_text_table", "write_report"]
