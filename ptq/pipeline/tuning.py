"""Tuning: the finished blocks of a run, distilled end to end from the original model.

    original, block by block ─▶ its last hidden states, for every batch
    blocks of the run ─▶ forward, keeping what each block reads ─▶ KL over the full vocabulary
          ▲                                                             │
          └── codes and gains ◀── Adam ◀── one block at a time, from the last ◀┘

GPTQ makes every layer as good as it can be for what it reads; this makes the codes of all layers
agree on what comes out of the model. Scales stay. Held-out text decides what is kept (A3): of all
states that were looked at the one of least KL, that from before tuning among them.

Memory holds the packed model, latents and moments (8 bytes a code, on disk with ``--activations
disk``), what blocks read in one step, and the derivative of one block.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ptq.calib.block_arguments import Call, hidden_states
from ptq.calib.block_by_block import BlockByBlock
from ptq.calib.calibrated_block import CalibratedBlock
from ptq.calib.hidden_states import HiddenStates
from ptq.checkpoint.tuning_report import TuningReport
from ptq.checkpoint.writer import CheckpointWriter
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.source import Source
from ptq.numerics.adam import rate
from ptq.pipeline.blocks_on_disk import LATENT, BlocksOnDisk
from ptq.pipeline.plan import Plan
from ptq.pipeline.tuned_block import TunedBlock
from ptq.pipeline.tuned_codes import Jumps, Latents, Moments, Trained, TunedCodes
from ptq.pipeline.tuning_text import TuningText
from ptq.runtime.quant_linear import QuantLinear

logger = logging.getLogger(__name__)

# Held-out text is looked at, and the state saved, after so many steps, or more so that it happens
# only so often.
EVERY, LOOKS = 10, 10
PATIENCE = 5  # looks that gain nothing before it ends
BROKEN = 1e9  # stands for a KL that is no number: JSON has none
BEST = "best."  # what names in a state begin with that are of what would be kept


@dataclass(frozen=True, kw_only=True)
class Step:
    """A step that was taken: its number, from 1, of how many, and KL in nats per token, of its own
    text and, where that was looked at, held out."""

    done: int
    steps: int
    kl: float
    held_out: float | None


def check_tunable(plan: Plan, *, on_disk: bool, ranks: int) -> None:
    """Raise ValueError, with what to do, for a run that could not be tuned when it has finished.

    Args:
        on_disk: whether the model is read from a directory and the result is written to one.
    """
    if not plan.recipe.tune:
        return
    if not on_disk:
        raise ValueError(
            "--tune compares with the original when all is quantized, and reads it again: give the "
            "directory of a model, and one for the result"
        )
    if ranks > 1:
        raise ValueError("--tune runs in one process: start it without torchrun, or leave it out")
    if plan.head is not None:
        raise ValueError("--tune leaves the output head as it is: leave out --lm-head, or --tune")
    if plan.recipe.kv_cache is not None:
        raise ValueError(
            "--tune cannot differentiate what --kv-cache rounds: leave out one of the two"
        )
    if not any(layer.tunable for layer in plan.layers.values()):
        formats = ", ".join(sorted({layer.recipe.format for layer in plan.layers.values()}))
        raise ValueError(
            f"--tune moves codes of 4 bits and the recipe has none ({formats}): leave it out"
        )


def interval(steps: int) -> int:
    """Steps from one look at held-out text to the next."""
    return max(EVERY, math.ceil(steps / LOOKS))


class Tuning:
    """Blocks that are tuned, and how far that is. Use it inside ``with``."""

    def __init__(
        self,
        source: Source,
        plan: Plan,
        finished: BlocksOnDisk,
        text: TuningText,
        *,
        device: torch.device,
        activations: str = "ram",
        on_step: Callable[[Step], None] | None = None,
    ) -> None:
        """
        Args:
            source: opened anew, no block of it is quantized yet.
            finished: all blocks of the run, made of ``source``.
            activations: where latents, moments and hidden states live.
            on_step: called after every step.
        """
        self.plan, self.text, self.finished = plan, text, finished
        self.writer: CheckpointWriter = finished.writer
        self.model = BlockByBlock(source, device, activations)
        self.source, self.device, self.on_step = source, device, on_step
        self.blocks: list[TunedBlock] = []
        self.best: list[dict[str, Tensor]] | None = None
        self._count = 0  # of tensors that are trained
        self._stack = ExitStack()
        self._places = partial(HiddenStates, activations, device)
        self._began = time.monotonic()

    def __enter__(self) -> "Tuning":
        with ExitStack() as stack:
            self.store = stack.enter_context(self._places())
            self.held = stack.enter_context(self._places())
            self.references = stack.enter_context(self._places())
            stack.enter_context(self.model.around())
            self.report = self._open()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _open(self) -> TuningReport:
        """The last hidden states of the original, all blocks as the run left them, or as tuning did
        that was interrupted; how far that was."""
        earlier = self.writer.tuning
        done = 0 if earlier is None else earlier.report.done
        needed = sorted({index for step in self.text.order[done:] for index in step})
        train = [self.text.train[index] for index in needed]
        tokens = [*self.text.held, *train]
        places = [(self.held, i) for i in range(len(self.text.held))]
        places += [(self.references, index) for index in needed]
        calls: list[list[Call]] = []
        for index, (name, module) in enumerate(self.model.blocks):
            self.source.fill(module, name, self.device)
            if index == 0:
                self.model.learn_form(tokens[0])
                for batch, (states, key) in zip(tokens, places, strict=True):
                    with torch.no_grad():
                        states[key], arguments = self.model.recorder(batch.to(self.device))
                    calls.append(arguments)
            with torch.no_grad():
                for (states, key), arguments in zip(places, calls, strict=True):
                    states[key] = hidden_states(arguments[index](module, states[key]))
            self.blocks.append(self._block(index))
        if earlier is not None:
            state = self.writer.read_tuning()
            for block in self.blocks:
                block.restore(_part(state, f"{block.name}."))
            if earlier.report.kept:
                self.best = [_part(state, f"{BEST}{block.name}.") for block in self.blocks]
            return earlier.report
        before = self.look()
        return TuningReport(
            codes=self.plan.recipe.tune_codes,
            steps=self.plan.recipe.tune,
            done=0,
            tokens=self.text.tokens,
            held_out_tokens=self.text.held_tokens,
            held_out=((0, before),),
            kept=0,
            flipped=0.0,
            seconds=0.0,
        )

    def _block(self, index: int) -> TunedBlock:
        """A block as the run left it, with what it is tuned by."""
        name, module = self.model.blocks[index]
        count = len(self.model.blocks)
        self.finished.reinstall(CalibratedBlock.of(name, module, index, count))
        stored = self.writer.read(name)

        def dtype(parameter: str) -> torch.dtype | None:
            tensor = stored.get(self.source.checkpoint_name(f"{name}.{parameter}"))
            return None if tensor is None else tensor.dtype

        return TunedBlock(name, module, self._codes(name, module, stored), dtype, self._trained)

    def _codes(
        self, block: str, module: nn.Module, stored: Mapping[str, Tensor]
    ) -> dict[str, TunedCodes]:
        """How the codes of a block's layers are tuned, by their names within it."""
        found: dict[str, TunedCodes] = {}
        if self.plan.recipe.tune_codes == "latents":
            for key, tensor in stored.items():
                if key.startswith(LATENT):
                    name = self._inner(block, key.removeprefix(LATENT))
                    layer = module.get_submodule(name)
                    assert isinstance(layer, QuantLinear)  # the run has quantized it
                    found[name] = Latents(layer, self._trained(tensor.to(self.device).float()))
            return found
        for name, inner in module.named_modules():
            planned = self.plan.layers.get(f"{block}.{name}")
            if isinstance(inner, QuantLinear) and planned is not None and planned.tunable:
                found[name] = Jumps(inner, self._moments(inner))
        return found

    def _inner(self, block: str, stored: str) -> str:
        """The name within its block of a layer that a checkpoint calls ``stored``."""
        own = self.source.module_name(f"{stored}.weight_packed").rpartition(".")[0]
        return own.removeprefix(f"{block}.")

    def _trained(self, value: Tensor) -> Trained:
        self._count += 1
        return Trained(self.store, self._count, value)

    def _moments(self, layer: QuantLinear) -> Moments:
        self._count += 1
        like = torch.empty(layer.out_features, layer.in_features, device=self.device)
        return Moments(self.store, self._count, like)

    @torch.no_grad()
    def look(self) -> float:
        """KL on held-out text, in nats per token."""
        total = 0.0
        for index, tokens in enumerate(self.text.held):
            tokens = tokens.to(self.device)
            hidden, calls = self.model.recorder(tokens)
            for call, (_, module) in zip(calls, self.model.blocks, strict=True):
                hidden = hidden_states(call(module, hidden))
            total += self.model.divergence(tokens, self.held[index], hidden, differentiate=False)[0]
        return total / self.text.held_tokens if math.isfinite(total) else BROKEN

    def run(self) -> TuningReport:
        """Take all steps that are left, and put the best into the writer's blocks."""
        every, steps = interval(self.report.steps), self.report.steps
        while self.report.done < steps and not self._stuck():
            try:
                kl = self.step(self.report.done)
            except FloatingPointError as error:
                logger.warning("tuning ends: %s", error)
                kl = math.nan
            done, held_out = self.report.done + 1, None
            self.report = replace(self.report, done=done)
            broken = not math.isfinite(kl)
            if done % every == 0 or done == steps or broken:
                held_out = self._look_and_save()
            if self.on_step is not None:
                self.on_step(Step(done=done, steps=steps, kl=kl, held_out=held_out))
            if broken:
                break
        self._finish()
        return self.report

    def _stuck(self) -> bool:
        """Whether the last looks gained nothing."""
        steps = [step for step, _ in self.report.held_out]
        return len(steps) - 1 - steps.index(self.report.kept) >= PATIENCE

    def step(self, index: int) -> float:
        """Take one step; KL of its text in nats per token before it was taken."""
        chosen = self.text.order[index]
        share = rate(index, self.report.steps)
        with ExitStack() as stack:
            batches = [self.model.begin(self.text.train[i]) for i in chosen]
            for batch in batches:
                stack.callback(batch.states.close)
            for _ in self.blocks:
                for batch in batches:
                    self.model.forward(batch)
            tokens = sum(batch.tokens.numel() for batch in batches)
            total, gradients = 0.0, list[Tensor]()
            for i, batch in zip(chosen, batches, strict=True):
                kl, gradient = self.model.divergence(
                    batch.tokens, self.references[i], batch.last, differentiate=True
                )
                assert gradient is not None
                if not math.isfinite(kl):
                    raise FloatingPointError("KL of its own text is NaN or infinite")
                total += kl
                gradients.append(gradient / tokens)
            for number in reversed(range(len(self.blocks))):
                block = self.blocks[number]
                with block.learning():
                    gradients = [
                        self.model.back(batch, number, gradient)
                        for batch, gradient in zip(batches, gradients, strict=True)
                    ]
                block.update(share)
        return total / tokens

    def _look_and_save(self) -> float:
        """Look at held-out text, keep what is best, and save all that is needed to go on."""
        kl = self.look()
        report = replace(
            self.report,
            held_out=(*self.report.held_out, (self.report.done, kl)),
            seconds=self.report.seconds + self._lap(),
        )
        if kl < self.report.after:
            changed = sum(block.changed() for block in self.blocks)
            weights = sum(block.weights for block in self.blocks)
            report = replace(report, kept=report.done, flipped=changed / weights)
            self.best = [block.result() for block in self.blocks]
        self.report = report
        state = _named([block.state() for block in self.blocks], self.blocks)
        best = _named(self.best or [], self.blocks)
        state |= {f"{BEST}{name}": tensor for name, tensor in best.items()}
        self.writer.save_tuning(state, report)
        return kl

    def _lap(self) -> float:
        began, self._began = self._began, time.monotonic()
        return self._began - began

    def _finish(self) -> None:
        """The best into the writer, without latents: what was there if nothing was better."""
        self.report = replace(self.report, seconds=self.report.seconds + self._lap())
        best = self.best or [{} for _ in self.blocks]

        def tensors(block: TunedBlock, changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
            stored = self.writer.read(block.name)
            kept = {name: t for name, t in stored.items() if not name.startswith(LATENT)}
            named = {
                self.source.checkpoint_name(f"{block.name}.{name}"): tensor
                for name, tensor in changes.items()
            }
            assert named.keys() <= kept.keys(), "tuning makes no tensor that was not there"
            return kept | named

        self.writer.replace(
            {
                block.name: partial(tensors, block, changes)
                for block, changes in zip(self.blocks, best, strict=True)
            },
            self.report,
        )


def tune(
    source: Source,
    plan: Plan,
    blocks: BlocksOnDisk,
    text: TuningText,
    *,
    activations: str,
    on_step: Callable[[Step], None] | None,
) -> None:
    """Tune the finished blocks of a run, unless an earlier run has finished that too."""
    state = blocks.writer.tuning
    if state is not None and state.file is None:
        for name, _ in source.blocks():
            blocks.writer.check_weights(name, source.digests(name))
        return
    # its layers are those of the original
    again = CheckpointSource(source.path, dtype=source.compute_dtype, hashed=True)
    with Tuning(
        again,
        plan,
        replace(blocks, source=again),
        text,
        device=blocks.device,
        activations=activations,
        on_step=on_step,
    ) as tuning:
        report = tuning.run()
    logger.log(logging.INFO if report.kept else logging.WARNING, "tuning: %s", report)


def _named(
    parts: Sequence[Mapping[str, Tensor]], blocks: Sequence[TunedBlock]
) -> dict[str, Tensor]:
    """All tensors of blocks under full names."""
    return {
        f"{block.name}.{name}": tensor
        for block, part in zip(blocks, parts, strict=False)
        for name, tensor in part.items()
    }


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with ``prefix``, which is taken off."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
