"""The table of dialects: a new one is a file with its record, and a row here."""

from collections.abc import Mapping

from ptq.checkpoint.dialect import Dialect
from ptq.checkpoint.dialect_compressed_tensors import COMPRESSED_TENSORS
from ptq.checkpoint.dialect_modelopt import MODELOPT
from ptq.checkpoint.dialect_ptq import PTQ
from ptq.checkpoint.quantization_config import Quantization

DIALECTS: dict[str, Dialect] = {
    dialect.name: dialect
    for dialect in (
        COMPRESSED_TENSORS,
        MODELOPT,
        PTQ,
    )
}


def dialect_of(quantization: Mapping[str, object], where: object = "config.json") -> Dialect:
    """The dialect of a ``quantization_config``; ValueError, starting with ``where``, if it is none
    of ours."""
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in DIALECTS:
        raise ValueError(f"{where} is quantized by {method!r}; ptq reads {', '.join(DIALECTS)}")
    return DIALECTS[method]


def parse(quantization: Mapping[str, object], where: object = "config.json") -> Quantization:
    """What a ``quantization_config`` says, whatever its dialect.

    Raises:
        ValueError: another quantization method, or whatever the dialect refuses; the message starts
            with ``where``.
    """
    dialect = dialect_of(quantization, where)
    try:
        return dialect.parse(quantization)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
