"""Calls that take a model: analyze, quantize, and forecast what that needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Unpack, overload

from torch import nn
from transformers import PreTrainedTokenizerBase

from ptq.api.arguments import (
    AnalyzeOptions,
    Name,
    QuantizeOptions,
    check_names,
    follower,
    placed,
    shown,
    split,
)
from ptq.api.checkpoints import Written, written
from ptq.calib.hidden_states import check_storage
from ptq.checkpoint.dialect_choice import Choice, Readers
from ptq.cli import progress as bars
from ptq.pipeline.analysis_files import check_folder
from ptq.pipeline.forecast import Forecast
from ptq.pipeline.forecast import forecast as forecast_run
from ptq.pipeline.plan import Plan
from ptq.pipeline.ranks import launched
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import Progress, quantize_model
from ptq.pipeline.study import Study, StudyOptions, Told, study
from ptq.pipeline.tuning import Step
from ptq.runtime.loaded_model import resolve_model


@overload
def quantize(
    model: Name,
    out: Name,
    *,
    format: str | None = None,
    scheme: str | None = None,
    recipe: Recipe | Name | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    progress: bool | Callable[[Progress | Step], None] = True,
    **options: Unpack[QuantizeOptions],
) -> Written: ...
@overload
def quantize(
    model: nn.Module,
    out: Name,
    *,
    format: str | None = None,
    scheme: str | None = None,
    recipe: Recipe | Name | None = None,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool | Callable[[Progress | Step], None] = True,
    **options: Unpack[QuantizeOptions],
) -> Written: ...
@overload
def quantize(
    model: nn.Module,
    out: None = None,
    *,
    format: str | None = None,
    scheme: str | None = None,
    recipe: Recipe | Name | None = None,
    tokenizer: PreTrainedTokenizerBase,
    progress: bool | Callable[[Progress | Step], None] = True,
    **options: Unpack[QuantizeOptions],
) -> nn.Module: ...
def quantize(
    model: Name | nn.Module,
    out: Name | None = None,
    *,
    format: str | None = None,
    scheme: str | None = None,
    recipe: Recipe | Name | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    revision: str | None = None,
    progress: bool | Callable[[Progress | Step], None] = True,
    **options: Unpack[QuantizeOptions],
) -> Written | nn.Module:
    """Quantize a causal language model and write the checkpoint; ``ptq quantize`` in Python.

        ptq.quantize("path/to/model", "out", format="nvfp4", scheme="w4a4")
        ptq.quantize("org/model", "out", format="mxfp4", eight_bit="10%", samples=64)

    Called again with the same arguments after an interruption, it continues where it stopped.

    Args:
        model: a directory, the id of a model on the hub, ``"demo"`` for the bundled one; or a model
            in memory, whose layers are then replaced in place.
        out: directory of the checkpoint, new or empty; None only for a model in memory.
        format: of the weights: mxfp4, nvfp4, nvint4, mxint4, mxint6, mxfp6, mxint8 or mxfp8.
        scheme: ``"w4a16"`` quantizes weights only (the default), ``"w4a4"`` inputs of layers too.
        recipe: all choices at once: a :class:`ptq.Recipe`, which takes no other choice beside it,
            or a JSON or TOML file of choices, which arguments override.
        tokenizer: of a model in memory; otherwise the one beside the weights.
        revision: branch, tag or commit of a model on the hub.
        progress: a bar on stderr, which is the default, or nothing; or what to call after every
            block, and after every step of tuning.
        quality: ``"fast"`` rounds to nearest, ``"default"`` reads as much text as takes minutes,
            ``"best"`` twice as much, with gradients (``fisher``).
        algorithm: ``"gptq"``; ``"rtn"``, round to nearest; ``"decoupleq"`` and ``"llm-fp4"``, see
            docs/siblings.md.
        rotation: size of Hadamard blocks, 1 or ``"none"`` for none, ``"auto"`` by measured loss.
        balance: 0 … 1, how far the range of large inputs moves into the weights.
        balance_factors: ``"exact"``, or ``"power_of_two"``, which only moves exponents.
        fisher: windows of text whose gradients tell which errors of outputs cost much; 0 for none.
        eight_bit: share of the weights that get 8 bits where that gains most, 0.1 or ``"10%"``.
        budget: the same as bits per weight on average, 4.75.
        nested: bits of a narrower format that the codes of mxint8 or mxint6 hold; 0 for none.
        tune: steps of end-to-end distillation of codes and norms afterwards; 0 for none.
        tune_codes: ``"latents"`` that drift, or ``"pv"``: a few codes jump in every step, in the
            manner of PV-Tuning (docs/siblings.md).
        kv_cache: ``"fp8"`` calibrates scales for keys and values; None leaves them alone.
        scales: how scales of weights are chosen: trial, mse, absmax, …
        weighted: a static search of scales weights columns by the size of their inputs.
        order: of columns in GPTQ: natural, act or group.
        damping: share of the mean diagonal that is added to the Hessian.
        descent: sweeps of coordinate descent on the codes after GPTQ.
        global_scale: absmax, or alternating.
        input_scale: global scale of quantized inputs: static (calibrated) or token.
        input_rule: how quantized inputs are scaled; the best that readers apply.
        ignore: names or patterns of layers that stay as they are.
        rules: ``{pattern: change}`` for single layers; a change is a format, ``"skip"``, or
            ``{choice: value}``.
        lm_head: quantize the output head too.
        route_all_experts: calibrate every expert on every token.
        calibration: the text: a file, a data set of the hub, or ``"builtin"``; ``field``: its
            column.
        samples, seq_len: how many sequences are read, and how long they are; by quality, model
            and device unless given.
        batch_size: sequences that run at the same time.
        seed: of the choice of text.
        device: ``"cpu"``, ``"cuda"``, …; the first GPU if there is one.
        dtype: of the computation; float32 on a CPU, else the model's own.
        dialect: auto, compressed-tensors, modelopt or ptq: how the result lies on disk, and so who
            opens it.
        target: transformers, vllm, sglang, trtllm or any (all of them): who must compute the result
            right; what they would not is refused.
        activations: where they wait between blocks: ram, device or disk.
        hessian_memory: bytes for the statistics of a block's experts at a time; half of what is
            free. The result does not depend on it.
        overwrite: replace a checkpoint of ours in ``out``.

    Returns:
        What was written, with the error of every layer; the model itself where ``out`` is None.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: in one line: what, where, what to do.
    """
    run, settled = split(options, format, scheme, recipe)
    device, dtype = placed(run)
    readers = Readers(run.pop("dialect", "auto"), run.pop("target", None))
    source = model if isinstance(model, nn.Module) else resolve_model(model, revision)
    bar = partial(bars.quantizing, quiet=not progress or follower())
    with shown(progress, bar) as on_block, launched(device) as place:

        def begins(plan: Plan) -> None:
            """Until the first block is over the bar says what is foretold."""
            if isinstance(on_block, bars.Quantizing) and not isinstance(source, nn.Module):
                told = {name: value for name, value in run.items() if name != "overwrite"}
                expected = forecast_run(source, settled, device=device, dtype=dtype, **told)
                on_block.expect(expected.block_seconds, seconds=True)

        done = quantize_model(
            source,
            out,
            recipe=settled,
            device=place,
            dtype=dtype,
            tokenizer=tokenizer,
            on_plan=begins if progress is True and not follower() else None,
            on_block=on_block,
            dialect=readers,
            **run,
        )
    if not isinstance(done, Choice):
        return done
    assert out is not None  # nothing else is written
    return written(Path(out), done)


def forecast(
    model: Name,
    *,
    format: str | None = None,
    scheme: str | None = None,
    recipe: Recipe | Name | None = None,
    revision: str | None = None,
    ranks: int = 1,
    **options: Unpack[QuantizeOptions],
) -> Forecast:
    """Memory, time and size that a run will need, from config.json alone: ``--dry-run`` in Python.

    Args:
        model: a directory (config.json is enough), hub id or ``"demo"``.
        format, scheme, recipe, revision: those of the run, as all other choices, see
            :func:`quantize`.
        ranks: processes that will share the work.

    Raises:
        ValueError, FileNotFoundError: what the run itself would refuse before reading weights.
    """
    run, settled = split(options, format, scheme, recipe)
    run.pop("overwrite", None)  # of no account before anything is written
    device, dtype = placed(run)
    source = resolve_model(model, revision)
    return forecast_run(source, settled, device=device, dtype=dtype, ranks=ranks, **run)


def analyze(
    model: Name,
    out: Name | None = None,
    *,
    direct_cast: bool = False,
    advise: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    progress: bool | Callable[[str, int, int, str], object] = True,
    **options: Unpack[AnalyzeOptions],
) -> Study:
    """Which format for which layer, and why; ``ptq analyze`` in Python. The model is not changed.

        study = ptq.analyze("path/to/model", "study", advise=True, budget=5)
        study.worst[0].name, study.worst[0].advice  # what will hurt, and what to do
        ptq.quantize("path/to/model", "out", recipe=study.recipe_file)

    Called again after an interruption, it goes on where it stopped; ``direct_cast`` and ``advise``
    add to what is in ``out``.

    Args:
        model: a directory, the id of a model on the hub, or ``"demo"``.
        out: directory of report.html, analysis.json and .csv, new or empty, or that of an
            unfinished analysis; None writes nothing.
        direct_cast: also round the whole model in each format, rotated and not: perplexity, KL.
        advise: also measure what every format costs every layer, and choose: needs ``budget`` or
            ``max_kl``.
        revision: branch, tag or commit of a model on the hub.
        overwrite: replace the analysis in ``out``.
        progress: bars on stderr, which is the default, or nothing; or what to call after every
            step with (stage, steps done, steps in all, what the last one was).
        scales: ``"absmax"``, as in the study, without clipping; ``"mse"`` searches, and no law
            predicts it.
        balance: strength of the balanced forms, 0.5; 0 leaves them out.
        calibration: text that inputs come from, ``"builtin"`` or as in :func:`quantize`;
            ``field``: its column.
        samples, seq_len: sequences of it, 8, and tokens in each, 256.
        tokens: of every input that are rounded and counted, 512.
        numbers: of every weight that are rounded and counted, 2^20, in evenly spaced rows.
        ignore: names or patterns of layers to leave out.
        seed: of the choice of text.
        text: that a direct cast is measured on, as :func:`evaluate` takes it; ``max_tokens``: of
            it, 8192; ``window``: tokens in a window, 512.
        budget: bits per weight on average that advice may spend.
        max_kl: or the loss, in nats per token, that it is to reach with the fewest bits.
        measure: of loss: ``"kl"`` over all tokens, ``"kl_top25"`` over the 25 most likely.
        scheme: ``"w4a4"``, inputs too, or ``"w4a16"``, weights only; of advice.
        formats: that advice chooses from, all eight unless given.
        device: the first GPU if there is one.
        dtype: of the computation; float32 on a CPU, else the model's own.
        activations: where they wait for a direct cast and advice: ram, device or disk.

    Returns:
        Tables, and all figures as data.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: in one line: what, where, what to do.
    """
    check_names(options, [*AnalyzeOptions.__annotations__, "progress", "revision"], "analyze")
    run = dict(options)
    device, dtype = placed(run)
    activations = str(run.pop("activations", "ram"))
    check_storage(activations)
    chosen = StudyOptions.of(run, direct_cast=direct_cast, advise=advise)
    folder = None if out is None else Path(out)
    if folder is not None:
        check_folder(folder, overwrite=overwrite, adding=direct_cast or advise)
    return study(
        resolve_model(model, revision),
        chosen,
        partial(bars.bar, not progress) if isinstance(progress, bool) else partial(_told, progress),
        folder=folder,
        overwrite=overwrite,
        device=device,
        dtype=dtype,
        activations=activations,
    )


@contextmanager
def _told(progress: Callable[[str, int, int, str], object], stage: str) -> Iterator[Told]:
    """A stage whose steps are told to the caller's function."""

    def step(done: int, total: int, text: str, *, known: bool = False) -> None:
        progress(stage, done, total, text)

    yield step
