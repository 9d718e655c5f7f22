"""The datasets: `open_dataset` and `read_dataset` open one by its name."""

from xsam import former_names

_REGISTRY = "xsam.datasets.registry"  # imports torch; sources.py is imported before it
__getattr__ = former_names(open_dataset=_REGISTRY, read_dataset=_REGISTRY)
