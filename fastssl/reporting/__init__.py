"""Compare runs: `fastssl report` writes tables, curves and commands of many runs as one file.

runs.py         finds and reads run directories
variants.py     groups runs that differ in their seed alone, and finds what each is compared with
measures.py     the metrics of their evaluations, and what single images contribute
differences.py  whether a difference is more than the noise of seeds and images
tables.py       the tables, as text
charts.py       the curves, as SVG
report.py       all of it together; page.py: as HTML; text.py: as Markdown and CSV; write.py: into a file
"""

from fastssl.reporting.report import Report, make_report
from fastssl.reporting.write import write_report

__all__ = ["Report", "make_report", "write_report"]
