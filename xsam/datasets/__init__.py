"""The datasets: `open_dataset` and `read_dataset` open one by its name."""


def __getattr__(name: str):
    """The two, only when they are asked for: `sources` is imported before torch."""
    if name in ("open_dataset", "read_dataset"):
        from xsam.datasets import registry

        return getattr(registry, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
