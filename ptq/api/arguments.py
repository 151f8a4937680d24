"""What the calls take: names and values as people write them → what the library takes."""

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch

from ptq.cli.options import make_recipe, parse_device, parse_dtype, parse_rotation, parse_share
from ptq.pipeline.recipe import Recipe
from ptq.runtime.load import Inputs, Prefill

Name = str | Path
C = TypeVar("C", bound=Callable[..., None])


class Choices(TypedDict, total=False):
    """What decides the numbers, besides format and scheme: :class:`ptq.Recipe` says what each is.
    What is left out is the best known choice for the format."""

    quality: str
    algorithm: str
    rotation: int | str
    scales: str
    weighted: bool
    order: str
    damping: float
    descent: int
    global_scale: str
    input_scale: str
    input_rule: str | None
    balance: float
    balance_factors: str
    fisher: int
    eight_bit: float | str
    budget: float | None
    nested: int
    tune: int
    tune_codes: str
    kv_cache: str | None
    ignore: tuple[str, ...] | list[str]
    rules: Mapping[str, Any] | tuple[tuple[str, Any], ...] | list[tuple[str, Any]]
    lm_head: bool
    route_all_experts: bool
    calibration: str
    field: str | None
    samples: int | None
    seq_len: int | None
    batch_size: int
    seed: int


class QuantizeOptions(Choices, total=False):
    """And where and how a run computes, and what may happen to what lies in its place."""

    device: torch.device | str | None
    dtype: torch.dtype | str | None
    dialect: str
    target: str | None
    activations: str
    hessian_memory: float | None
    overwrite: bool


class AnalyzeOptions(TypedDict, total=False):
    """How a model is looked at; :func:`ptq.analyze` says what each is."""

    scales: str
    balance: float
    calibration: str
    field: str | None
    samples: int
    seq_len: int
    tokens: int
    numbers: int
    ignore: tuple[str, ...] | list[str]
    seed: int
    text: str
    max_tokens: int
    window: int
    budget: float | None
    max_kl: float | None
    measure: str
    scheme: str
    formats: tuple[str, ...] | list[str]
    device: torch.device | str | None
    dtype: torch.dtype | str | None
    activations: str


class LoadOptions(TypedDict, total=False):
    """How a checkpoint is loaded; :func:`load` says what each is."""

    inputs: Inputs
    cache: bool | None
    bits: int | None
    prefill: Prefill
    device_map: str | Mapping[str, int | str | torch.device] | None
    max_memory: dict[int | str, int | str] | None
    offload_folder: Name | None


def split(
    options: Mapping[str, Any], format: str | None, scheme: str | None, recipe: Recipe | Name | None
) -> tuple[dict[str, Any], Recipe]:
    """(options of the run, the recipe): ValueError for a name that is neither, or for choices
    beside a recipe."""
    names = Choices.__annotations__.keys()
    known = [*QuantizeOptions.__annotations__, "format", "scheme", "recipe", "progress"]
    check_names(options, known, "quantize")
    choices = {n: v for n, v in options.items() if n in names and v is not None}
    run = {n: v for n, v in options.items() if n not in names}
    if scheme is not None:
        choices["scheme"] = scheme
    if isinstance(recipe, Recipe):
        if format is not None or choices:
            given = [*(["format"] if format else []), *choices]
            raise ValueError(
                f"recipe= is every choice; put {', '.join(given)} into it, as "
                "dataclasses.replace(recipe, …) does, or leave recipe= out"
            )
        return run, recipe
    if isinstance(rotation := choices.get("rotation"), str) and rotation != "auto":
        choices["rotation"] = parse_rotation(rotation)
    if isinstance(share := choices.get("eight_bit"), str):
        choices["eight_bit"] = parse_share("eight_bit", share)
    return run, make_recipe(format, None if recipe is None else Path(recipe), choices)


def check_names(options: Mapping[str, Any], known: Iterable[str], call: str) -> None:
    """Raise ValueError for an option that a call does not have, with the one that looks like it."""
    known = list(known)
    if unknown := sorted(options.keys() - set(known)):
        near = difflib.get_close_matches(unknown[0], known, n=3)
        raise ValueError(
            f"unknown argument {unknown[0]!r}{f'; did you mean {near[0]}?' if near else ';'} "
            f"help(ptq.{call}) lists all"
        )


def placed(run: dict[str, Any]) -> tuple[torch.device, torch.dtype | None]:
    """Device and dtype, taken out of the options of a run."""
    return to_device(run.pop("device", None)), to_dtype(run.pop("dtype", None))


def to_device(device: torch.device | str | None) -> torch.device:
    """The device, the one of that name, or the first GPU, else the CPU."""
    return device if isinstance(device, torch.device) else parse_device(device)


def to_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The dtype, or the one of that name; None stays None."""
    return dtype if isinstance(dtype, torch.dtype) else parse_dtype(dtype)


def shown(
    progress: bool | C, bar: Callable[[], AbstractContextManager[C]]
) -> AbstractContextManager[C]:
    """What is told as it goes: by the caller's function, or by a bar."""
    return bar() if isinstance(progress, bool) else nullcontext(progress)


def follower() -> bool:
    """Whether another process of a torchrun launch speaks."""
    return os.environ.get("RANK", "0") != "0"
