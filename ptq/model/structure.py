"""From a path to an empty model, the names of its decoder blocks, its head and its routers."""

import copy
import logging
import re
import stat
from collections.abc import Collection
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    StrictDataclassError,
)
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Cache,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from ptq.reading.model_config import CONFIG, Stored, check_routing, check_sizes, read_model_config
from ptq.reading.schema import JsonObject, read_json

logger = logging.getLogger(__name__)

GENERATION = "generation_config.json"

# What transformers raises for values that it does not expect: it checks types, not sizes.
FOREIGN = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    OSError,
    RuntimeError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
LARGEST_PARAMETER = 1 << 36  # the experts of a layer of the largest known models have 2^34 numbers
LARGEST_BUFFERS = 4 << 30  # causal masks of GPT-Neo: 24 · 2048²
DEQUANTIZED = ("mxfp4", "fp8")  # methods whose tensors are filled dequantized
WANTED = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "README.md",
    "LICENSE*",
    "NOTICE*",
)
ADAPTER = "adapter_config.json"
HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def resolve(path: str | Path, revision: str | None = None) -> Path:
    """The directory of a checkpoint: ``path`` itself, or where the hub model of that name is cached
    or downloaded to.

    Args:
        revision: branch, tag or commit of a model of the hub; None is its main branch.

    Raises:
        FileNotFoundError: there is neither; says why the hub did not help.
        ValueError: a revision of a directory.
    """
    directory = Path(path).expanduser()
    if directory.is_dir() and revision is not None:
        raise ValueError(
            f"{path} is a directory, and a revision ({revision}) is one of a model of the hub: "
            "leave it out"
        )
    if directory.is_dir():
        _refuse_devices(directory)
        return directory
    if directory.suffix == ".gguf" and directory.exists():
        raise FileNotFoundError(
            f"{path} is quantized already, as GGUF files are: start from the original model, or "
            "unpack it (transformers: AutoModelForCausalLM.from_pretrained(DIR, gguf_file=FILE)"
            ".save_pretrained(...))"
        )
    if directory.exists():
        raise FileNotFoundError(f"{path} is a file; give the directory of the model")
    if not HUB_ID.match(str(path)):
        raise FileNotFoundError(f"{path} does not exist")
    for offline in (True, False):
        try:
            return Path(
                snapshot_download(
                    str(path),
                    revision=revision,
                    allow_patterns=list(WANTED),
                    local_files_only=offline,
                )
            )
        except (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            OSError,
            RuntimeError,
        ) as error:
            if not offline:
                reason = _first_line(error)
                at = f" at revision {revision}" if revision else ""
                raise FileNotFoundError(
                    f"no directory {path}, and no such model{at} could be fetched from the Hugging "
                    f"Face hub ({reason})"
                ) from error
    raise AssertionError


def _refuse_devices(directory: Path) -> None:
    """Raise OSError for a pipe or device in the place of a file: libraries would read it without
    end."""
    for path in directory.iterdir():
        mode = path.stat().st_mode if path.exists() else stat.S_IFREG  # a dead link is missing
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(f"{path} is no regular file: put a copy of the file there")


def read_generation_config(directory: Path) -> GenerationConfig | None:
    """The ``generation_config.json`` of a model; None where there is none or, with a warning, where
    it cannot be used: transformers ignores such a file, too."""
    file = directory / GENERATION
    if not file.exists():
        return None
    try:
        return GenerationConfig.from_dict(read_json(file, JsonObject, "copy it again"))
    except FOREIGN as error:
        logger.warning("%s is left out, it cannot be used: %s", file, _first_line(error))
        return None


def require_config(path: Path) -> None:
    """Raise FileNotFoundError where a directory has no configuration, so is none of a model."""
    if (path / ADAPTER).exists() and not (path / CONFIG).exists():
        raise FileNotFoundError(
            f"{path} is a LoRA adapter, not a model: merge it into its base first (peft: "
            "AutoPeftModelForCausalLM.from_pretrained(...).merge_and_unload().save_pretrained(...))"
        )
    if not (path / CONFIG).exists():
        raise FileNotFoundError(
            f"{path} has no config.json: not the directory of a Hugging Face model"
        )


def load_config(path: Path, stored: Stored | None = None) -> PretrainedConfig:
    """The model's configuration. Raises OSError or ValueError; code in the checkpoint is never run.

    Args:
        stored: what the weight files hold, if there are any: numbers of layers and experts that do
            not fit are refused before anything is looped over.
    """
    require_config(path)
    check_sizes(read_model_config(path), stored, path / CONFIG)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except FOREIGN as error:
        cause = (
            error.__cause__
            if isinstance(error, StrictDataclassError) and error.__cause__
            else error
        )
        raise ValueError(f"{path / 'config.json'} cannot be used: {_first_line(cause)}") from error
    check_routing(config.to_dict(), path / CONFIG)
    return config


def build_model(
    config: PretrainedConfig, path: Path, dtype: torch.dtype, stored: Stored | None = None
) -> PreTrainedModel:
    """An untrained model of the configured class: parameters on the meta device, buffers real.

    The class that the configuration names if it is a causal or a vision-language model, else the
    one that belongs to its type. It is built twice: first without any memory, to see that no
    parameter is larger than the weight files and that its buffers fit.

    Raises:
        ValueError: it is not causal, cannot be built, or has sizes that the weights do not.
    """
    config = copy.deepcopy(config)
    architecture = (getattr(config, "architectures", None) or ["?"])[0]
    classes = {
        auto: _class_of(auto, config)
        for auto in (AutoModelForCausalLM, AutoModelForImageTextToText)
    }
    suited = [auto for auto, name in classes.items() if name == architecture]
    if _is_causal(architecture):
        suited += [auto for auto, name in classes.items() if name is not None]
    if not suited:
        kind = f"architecture {architecture}, model type {config.model_type!r}"
        raise ValueError(f"{path} is not a causal language model ({kind})")
    try:
        with init_empty_weights(include_buffers=True):
            _check_tensors(suited[0].from_config(config, dtype=dtype), stored)
        with init_empty_weights(include_buffers=False):
            return suited[0].from_config(config, dtype=dtype)
    except FOREIGN as error:
        name = classes[suited[0]]
        raise ValueError(
            f"{path}: {name} cannot be built from config.json: {_first_line(error)}"
        ) from error


def _check_tensors(model: nn.Module, stored: Stored | None) -> None:
    """Raise ValueError for a parameter that the weight files cannot hold, or buffers that do not
    fit."""
    most = LARGEST_PARAMETER if stored is None else 8 * stored.bytes  # a bit a weight
    for name, parameter in model.named_parameters():
        if parameter.numel() > most:
            files = "" if stored is None else f" and the weight files {stored.bytes} bytes in all"
            raise ValueError(f"{name} would have shape {tuple(parameter.shape)}{files}")
    if (size := sum(b.numel() * b.itemsize for b in model.buffers())) > LARGEST_BUFFERS:
        raise ValueError(f"its buffers would take {size} bytes, those of no known model do")


def _class_of(
    auto: type[AutoModelForCausalLM | AutoModelForImageTextToText], config: PretrainedConfig
) -> str | None:
    mapping = auto._model_mapping
    models = mapping.get(type(config), None)
    model = models[0] if isinstance(models, tuple) else models
    return None if model is None else model.__name__


def _is_causal(architecture: str) -> bool:
    known = hasattr(transformers, architecture)
    return not known or architecture.endswith(
        ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
    )


def _first_line(error: BaseException) -> str:
    return next(
        (line for line in str(error).strip().splitlines() if line.strip()), type(error).__name__
    )


def quantized_by(config: PretrainedConfig) -> str | None:
    """The method that quantized a checkpoint, None for weights as they were trained."""
    method = getattr(config, "quantization_config", None)
    if not method:
        return None
    if not isinstance(method, dict):
        return type(method).__name__
    return str(method.get("quant_method", "unknown method"))


def refuse_quantized(config: PretrainedConfig, path: Path) -> None:
    """Raise ValueError for a checkpoint that cannot be the source of a run."""
    if (kind := quantized_by(config)) not in (None, *DEQUANTIZED):
        raise ValueError(f"{path} is already quantized ({kind}); start from the original model")


def find_blocks(model: nn.Module) -> list[str]:
    """The names of the decoder's blocks: the ``ModuleList`` beside the token embedding that holds
    the most parameters.

    Lists inside other lists (experts) and lists of other towers (vision) do not count. ValueError
    when there is none, or when its blocks contain no ``nn.Linear``.
    """
    lists = {
        name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)
    }
    outer = {
        n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)
    }
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    home = next((n.rpartition(".")[0] for n, m in model.named_modules() if m is embedding), "")
    beside = {n: m for n, m in outer.items() if not home or n.startswith(f"{home}.")} or outer
    sizes = {n: sum(p.numel() for p in m.parameters() if p.ndim >= 2) for n, m in beside.items()}
    if not sizes or not max(sizes.values()):
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks")
    name = max(sizes, key=lambda n: sizes[n])
    if not any(isinstance(m, nn.Linear) for m in lists[name].modules()):
        kinds = sorted(
            {
                type(m).__name__
                for m in lists[name].modules()
                if next(m.parameters(recurse=False), None) is not None
            }
        )
        raise ValueError(
            f"the blocks of {type(model).__name__} contain no Linear layers (but "
            f"{', '.join(kinds)}): not supported"
        )
    return [f"{name}.{i}" for i in range(len(lists[name]))]


def positions(config: PretrainedConfig) -> int | None:
    """The longest sequence that a model is made for, in tokens, if its configuration says."""
    text = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        limit = getattr(text, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def is_cache(value: object) -> bool:
    """Whether a model has handed its blocks a cache of keys and values."""
    return isinstance(value, Cache)


def find_head(model: nn.Module) -> str:
    """The name of the output head. Raises ValueError when it is no ``nn.Linear`` of its own, but
    tied or missing."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    kind = type(model).__name__
    if not isinstance(head, nn.Linear):
        raise ValueError(
            f"{kind} has no linear output head that could be quantized; leave the output head as "
            "it is"
        )
    name = next(n for n, m in model.named_modules() if m is head)
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    shared = isinstance(embedding, nn.Embedding) and embedding.weight is head.weight
    if shared or f"{name}.weight" in getattr(model, "all_tied_weights_keys", {}):
        raise ValueError(
            f"the output head {name} of {kind} is tied to the embedding, which must stay exact; "
            "leave the output head as it is"
        )
    return name


def linearize(model: nn.Module, only: Collection[str] | None = None) -> set[str]:
    """Replace every ``Conv1D`` (GPT-2's linear layer with a transposed weight) by the ``nn.Linear``
    that computes the same, in place; return the names of the weights. ``only``: names of the
    modules to replace, None for all."""
    weights = set()
    for name, old in list(model.named_modules()):
        if isinstance(old, Conv1D) and (only is None or name in only):
            new = nn.Linear(old.nx, old.nf, device="meta", dtype=old.weight.dtype)
            new.weight = nn.Parameter(old.weight.detach().T, requires_grad=False)
            new.bias = nn.Parameter(old.bias.detach(), requires_grad=False)
            model.set_submodule(name, new.train(old.training))
            weights.add(f"{name}.weight")
    return weights


def is_router(model: nn.Module, name: str) -> bool:
    """Whether the module ``name`` of ``model`` decides which experts a token goes to, or how much
    they count.

    That is so if it, or what holds it, is called ``router``, or ``gate`` or ``…_gate`` beside
    experts. The gate projection of an MLP is none.
    """
    parts = name.split(".")
    if any("router" in part for part in parts[-2:]):
        return True
    for depth in range(1, min(2, len(parts)) + 1):
        leaf, beside = parts[-depth], model.get_submodule(".".join(parts[:-depth]))
        if (leaf == "gate" or leaf.endswith("_gate")) and any(
            "expert" in n for n, _ in beside.named_children()
        ):
            return True
    return False
