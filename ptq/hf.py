"""``import ptq.hf`` teaches transformers to load what ptq writes
(:mod:`ptq.runtime.transformers_plugin`)."""

from ptq.runtime.transformers_plugin import PtqConfig, PtqQuantizer, register

__all__ = ["PtqConfig", "PtqQuantizer", "register"]
