"""See xsam.datasets.formats."""

from xsam.datasets.formats import *  # noqa: F403
