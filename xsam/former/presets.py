"""`xsam.config.toy` of version 0.1, whose configuration could be changed in place."""

from xsam.config import Config
from xsam.toy import preset


class ChangeableConfig(Config):
    """A configuration whose fields can be set."""

    __setattr__ = object.__setattr__


def toy() -> ChangeableConfig:
    """The toy preset; see `xsam.toy.preset`."""
    return ChangeableConfig(**vars(preset.toy()))
