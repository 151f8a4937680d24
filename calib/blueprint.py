"""A model from its configuration alone: every module on the meta device, experts split, no weights needed."""

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig

from ptq.calib.experts import unfuse
from ptq.calib.names import NameMap
from ptq.calib.structure import build_model, find_blocks, linearize, load_config, resolve


def blueprint(path: str | Path) -> tuple[PretrainedConfig, nn.Module, list[str]]:
    """(configuration, model on meta, names of its decoder blocks) of a directory that needs no more than a config.json.

    Raises FileNotFoundError or ValueError as :class:`ptq.calib.source.Source` does.
    """
    directory = resolve(path)
    config = load_config(directory)
    dtype = getattr(config, "dtype", None)
    with init_empty_weights(include_buffers=False):
        model = build_model(config, directory, dtype if isinstance(dtype, torch.dtype) else torch.bfloat16)
    linearize(model)
    unfuse(model, NameMap(model).expert_names)
    return config, model, find_blocks(model)
