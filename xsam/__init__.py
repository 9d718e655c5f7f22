"""X-SAM in PyTorch. Start reading at model.py; README.md has the map."""

import importlib
from collections.abc import Callable

__path__.append(f"{__path__[0]}/former")


def former_names(**places: str) -> Callable:
    """The `__getattr__` of a module whose names of version 0.1 lie in other modules now:
    name="module". They are imported when they are asked for."""

    def find(name: str):
        if name in places:
            return getattr(importlib.import_module(places[name]), name)
        raise AttributeError(f"xsam has no {name!r} here")

    return find
