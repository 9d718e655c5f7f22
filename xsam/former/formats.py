"""See xsam.datasets.formats and xsam.images."""

from xsam.datasets.formats import *  # noqa: F403
from xsam.images import read_image, read_region  # noqa: F401
