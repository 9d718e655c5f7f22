"""See xsam.report.pictures."""

from xsam.report.pictures import *  # noqa: F403
