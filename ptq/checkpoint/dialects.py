"""The tables of dialects: a new one is a file with its record, and a row here."""

from collections.abc import Mapping

from ptq.checkpoint.dialect import Dialect
from ptq.checkpoint.dialect_compressed_tensors import COMPRESSED_TENSORS
from ptq.checkpoint.dialect_modelopt import MODELOPT
from ptq.checkpoint.dialect_mxfp4 import GPT_OSS
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
# What is read: those of others, too, that are not written.
READ: dict[str, Dialect] = DIALECTS | {dialect.name: dialect for dialect in (GPT_OSS,)}


def dialect_of(quantization: Mapping[str, object], where: object = "config.json") -> Dialect:
    """The dialect of a ``quantization_config``; ValueError, starting with ``where``, if it is none
    of ours."""
    method = quantization.get("quant_method")
    if not isinstance(method, str) or method not in READ:
        raise ValueError(f"{where} is quantized by {method!r}; ptq reads {', '.join(READ)}")
    return READ[method]


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
