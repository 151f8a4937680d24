"""TEMP."""

from ptq.model.checkpoint_source import Source as _Disk
from ptq.model.memory_source import MemorySource

Source = _Disk | MemorySource
