"""`xsam.config.toy` of version 0.1, whose configuration could be changed in place."""

from xsam.config import Config
from xsam.toy import preset


class ChangeableConfig(Config):
    __setattr__ = object.__setattr__


def toy() -> ChangeableConfig:
    return ChangeableConfig(**vars(preset.toy()))
