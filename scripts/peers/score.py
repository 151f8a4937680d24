"""The scorer: how far a checkpoint is from the original on a text, whoever wrote it.

Files are decoded by ptq alone, and inputs are quantized as the checkpoint says (`ptq.load` with
``inputs="quantized"``), everything else is float32. The original's logits are computed once for
each text and kept in a file, so that all checkpoints are compared with the same numbers.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ptq.runtime.evaluate import check_logits, kl_divergence, nll, same_top1, windows
from ptq.runtime.load import load
from ptq.text.windows import load_text

POSITIONS = 64  # compared at a time, which bounds memory


@dataclass(frozen=True)
class Text:
    """A held-out text, cut into windows of token ids (rows, seq_len)."""

    name: str
    rows: Tensor

    @property
    def sha256(self) -> str:
        """Of the token ids, int64, little endian."""
        return hashlib.sha256(self.rows.numpy().astype("<i8").tobytes()).hexdigest()

    @property
    def predictions(self) -> int:
        return self.rows.numel() - len(self.rows)


def read_text(
    source: str, tokenizer: PreTrainedTokenizerBase, seq_len: int, max_tokens: int
) -> Text:
    """The first ``max_tokens`` tokens of a file, or of ``builtin`` text."""
    ids = tokenizer(load_text(source), add_special_tokens=False, verbose=False)["input_ids"]
    return Text(Path(source).stem, windows(torch.tensor(ids), seq_len, max_tokens).clone())


@dataclass(frozen=True, kw_only=True)
class Score:
    """Of one text; every list has an entry for each window, a mean over its predictions.

    Attributes:
        kl: KL(original ‖ quantized) over the full vocabulary, nats.
        nll: of the next token, nats.
        top1: how often both find the same token most likely.
    """

    kl: list[float]
    nll: list[float]
    top1: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Means, their standard error, and the KL of every window: differences of two checkpoints
        are surer than either, as both read the same."""
        return {
            "kl": fmean(self.kl),
            "kl_error": standard_error(self.kl),
            "perplexity": math.exp(fmean(self.nll)),
            "top1": fmean(self.top1),
            "kl_by_window": [round(value, 6) for value in self.kl],
        }


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of windows, which are independent of each other as neighbouring tokens are not;
    None for a single one."""
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


class Original:
    """The model that all are compared with; its logits lie in ``folder``, 4 bytes each."""

    def __init__(self, path: Path, folder: Path, digest: str) -> None:
        self.path, self.folder, self.digest = path, folder, digest

    def logits(self, text: Text) -> np.ndarray:
        """(rows, seq_len, vocabulary) float32, a view of the file."""
        name = f"original-{self.digest[:12]}-{text.sha256[:12]}-{text.rows.shape[1]}.npy"
        file = self.folder / name
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            model = AutoModelForCausalLM.from_pretrained(
                self.path, dtype=torch.float32, local_files_only=True
            ).eval()
            part = file.with_suffix(".part")
            shape = (*text.rows.shape, model.config.get_text_config().vocab_size)
            stored = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
            for i, row in enumerate(text.rows):
                stored[i] = logits_of(model, row, f"the original, window {i + 1}").numpy()
            stored.flush()
            part.rename(file)
        return np.load(file, mmap_mode="r")

    def perplexity(self, text: Text) -> float:
        """Its own."""
        logits = self.logits(text)
        total = 0.0
        for i, row in enumerate(text.rows):
            for j in range(0, len(row) - 1, POSITIONS):
                targets = row[j + 1 : j + 1 + POSITIONS]
                part = torch.from_numpy(logits[i, j : j + len(targets)].copy())
                total += float(nll(part, targets).sum())
        return math.exp(total / text.predictions)


def score(model: nn.Module, original: Original, text: Text) -> Score:
    """Compare a model with the original, window by window.

    Raises:
        ValueError: NaN or infinite logits, or another vocabulary.
    """
    found = Score(kl=[], nll=[], top1=[])
    reference = original.logits(text)
    for i, row in enumerate(text.rows):
        logits = logits_of(model, row, f"the checkpoint, window {i + 1}")
        if logits.shape != reference[i].shape:
            raise ValueError(
                f"its vocabulary has {logits.shape[-1]} tokens, the original's "
                f"{reference.shape[-1]}"
            )
        found.kl.append(0.0)
        found.nll.append(0.0)
        found.top1.append(0.0)
        count = len(row) - 1
        for part in (slice(j, min(j + POSITIONS, count)) for j in range(0, count, POSITIONS)):
            exact = torch.from_numpy(reference[i, part].copy())
            found.kl[-1] += float(kl_divergence(exact, logits[part]).sum()) / count
            found.nll[-1] += float(nll(logits[part], row[1:][part]).sum()) / count
            found.top1[-1] += float(same_top1(exact, logits[part]).sum()) / count
    return found


def open_checkpoint(path: Path) -> nn.Module:
    """A checkpoint of any tool as an engine of its dialect would compute it, in float32."""
    return load(path, dtype=torch.float32, inputs="quantized", cache=True)


@torch.no_grad()
def logits_of(model: nn.Module, row: Tensor, where: str) -> Tensor:
    """(seq_len, vocabulary) float32 of a window; ``where`` it is, for errors."""
    logits = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0].float()
    check_logits(logits, where)
    return logits
