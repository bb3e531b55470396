"""From the results.json of a study to its page and its terminal table. Never imports torch."""

from varkd.report.study.page import write_study
from varkd.report.study.terminal import format_study

__all__ = ["format_study", "write_study"]
