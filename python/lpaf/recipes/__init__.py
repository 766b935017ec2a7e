"""The compression methods as chains of stages, and the command behind ``lpaf compress``."""

from .compress import compress
from .methods import METHODS
from .options import CompressOptions

__all__ = ["METHODS", "CompressOptions", "compress"]
