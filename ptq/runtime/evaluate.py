"""How far a quantized model is from the original: perplexity, KL divergence, agreement.

The text is cut into windows of ``seq_len`` tokens that do not overlap; each is fed as it is,
without a start token, and the tail that fills no window is dropped. Position i of a window predicts
token i + 1, so a window of n tokens counts n - 1 predictions, and every figure is a mean over the
same predictions. All of them are computed in float64 from the models' logits and given in nats.

The two divergences:

- ``kl``: KL(original ‖ quantized) over the full vocabulary.
- ``kl_top25``: the figure of "INT v.s. FP" (https://arxiv.org/abs/2510.25602): both logit vectors
  are gathered at the 25 tokens that the *original* finds most likely, each is normalised by a
  softmax over those 25 alone, and the KL divergence of the two is taken. Given in nats per token,
  like ``kl``. The paper prints a mean over tokens *and* the 25 entries, times 10⁶:
  ``kl_top25_printed = kl_top25 * 1e6 / 25`` compares with its tables.

The reference is run again for every window, so two models are in memory and never more than one
window of logits.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor, nn

from ptq.runtime.figures import number, percent
from ptq.runtime.tables import Table, Tabular

TOP = 25
# Positions compared at a time: 64 x a vocabulary of 128k x float64 = 66 MB for each of a handful of
# copies.
POSITIONS = 64


def nll(
    logits: Float[Tensor, "tokens vocab"], targets: Int64[Tensor, "tokens"]
) -> Float64[Tensor, "tokens"]:
    """Negative log-likelihood of each target, in nats."""
    return -logits.double().log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def kl_divergence(
    reference: Float[Tensor, "tokens vocab"], logits: Float[Tensor, "tokens vocab"]
) -> Float64[Tensor, "tokens"]:
    """KL(softmax(reference) ‖ softmax(logits)) at each token, in nats; entries of probability zero
    add nothing."""
    p, q = reference.double().log_softmax(-1), logits.double().log_softmax(-1)
    return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(-1)


def kl_top(
    reference: Float[Tensor, "tokens vocab"],
    logits: Float[Tensor, "tokens vocab"],
    count: int = TOP,
) -> Float64[Tensor, "tokens"]:
    """KL divergence over the reference's ``count`` most likely tokens alone, both sides
    renormalised; nats."""
    top = reference.topk(min(count, reference.shape[-1]), dim=-1).indices
    return kl_divergence(reference.gather(-1, top), logits.gather(-1, top))


def same_top1(
    reference: Float[Tensor, "tokens vocab"], logits: Float[Tensor, "tokens vocab"]
) -> Bool[Tensor, "tokens"]:
    """Whether both find the same token most likely (the lowest index among equals)."""
    return reference.argmax(-1) == logits.argmax(-1)


@dataclass(frozen=True, kw_only=True, repr=False)
class Evaluation(Tabular):
    """Means over ``tokens`` predictions; what compares with a reference is None without one.

    ``model``, ``reference`` and ``text`` are what they were called by; empty where nobody said.
    """

    perplexity: float  # exp(nll)
    nll: float  # nats per token
    kl: float | None  # nats per token, full vocabulary
    kl_top25: float | None  # nats per token, the module docstring says over what
    top1_agreement: float | None  # 0 … 1
    reference_perplexity: float | None
    reference_nll: float | None
    tokens: int  # predictions: windows * (seq_len - 1)
    windows: int
    seq_len: int
    seconds: float  # of the model's forward passes, without the reference's
    model: str = ""
    reference: str | None = None
    text: str = ""

    @property
    def tokens_per_second(self) -> float:
        return self.windows * self.seq_len / self.seconds

    @property
    def kl_top25_printed(self) -> float | None:
        """``kl_top25`` in the unit of the paper's tables: 10⁻⁶, divided by 25 more."""
        return None if self.kl_top25 is None else self.kl_top25 * 1e6 / TOP

    def to_dict(self) -> dict[str, float | int | str | None]:
        """All fields and derived figures, for JSON."""
        derived = {
            "kl_top25_printed": self.kl_top25_printed,
            "tokens_per_second": self.tokens_per_second,
        }
        return {**asdict(self), **derived}

    def tables(self) -> tuple[Table, ...]:
        """One: the reference first, if there is one, then the model."""
        compared = self.kl is not None
        reference = (
            self.reference or "reference",
            number(self.reference_perplexity),
            number(self.reference_nll),
            *("0", "0", "100 %", "–"),
        )
        model = (
            self.model or "model",
            number(self.perplexity),
            number(self.nll),
            number(self.kl),
            number(self.kl_top25),
            percent(self.top1_agreement),
            f"{self.tokens_per_second:.0f}",
        )
        note = (
            "nats per token; KL(reference ‖ model) over the full vocabulary; "
            f"KL top {TOP}: over the reference's {TOP} most likely tokens, both renormalised "
            f"(as the INT-vs-FP paper prints it, × 10⁶ / {TOP}: {number(self.kl_top25_printed)})"
        )
        table = Table(
            title=f"{self.text or 'text'}: {self.tokens} predictions in {self.windows} windows of "
            f"{self.seq_len} tokens",
            columns=("model", "perplexity", "nll", "KL", f"KL top {TOP}", "top-1", "tokens/s"),
            rows=(reference, model) if compared else (model,),
            dim=frozenset({0} if compared else ()),
            notes=(note,) if compared else (),
        )
        return (table,)


def windows(
    tokens: Int64[Tensor, "size"], seq_len: int, max_tokens: int | None = None
) -> Int64[Tensor, "rows seq"]:
    """``tokens`` cut into rows of ``seq_len``, the tail dropped; at most ``max_tokens`` of them are
    used.

    Raises:
        ValueError: a window of fewer than two tokens, or a text (or ``max_tokens``) too short for
            one window.
    """
    if seq_len < 2:
        raise ValueError(f"--seq-len {seq_len} leaves nothing to predict; use 2 or more")
    if max_tokens is not None and max_tokens < seq_len:
        raise ValueError(
            f"--max-tokens {max_tokens} is less than one window of {seq_len} tokens; lower "
            "--seq-len"
        )
    count = min(len(tokens), max_tokens or len(tokens)) // seq_len
    if count == 0:
        raise ValueError(
            f"the evaluation text has {len(tokens)} tokens and one window needs {seq_len}; "
            "give a longer text or lower --seq-len"
        )
    return tokens[: count * seq_len].view(count, seq_len)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tokens: Int64[Tensor, "size"],
    *,
    reference: nn.Module | None = None,
    seq_len: int = 2048,
    max_tokens: int | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Evaluate a causal language model on a text, and compare it with ``reference`` if there is
    one.

    Args:
        model: called as ``model(input_ids=…, use_cache=False).logits``, as all models of
            transformers are.
        tokens: the text as token ids.
        on_window: told (windows done, windows in all) after each window.

    Raises:
        ValueError: a text too short for one window, token ids outside the vocabulary, NaN or
            infinite logits, or two models whose vocabularies differ in size.
    """
    rows = windows(tokens, seq_len, max_tokens)
    sums = {"nll": 0.0, "reference_nll": 0.0, "kl": 0.0, "kl_top25": 0.0, "top1_agreement": 0.0}
    seconds = 0.0
    for done, row in enumerate(rows):
        logits, elapsed = _logits(model, row, f"the model, window {done + 1} of {len(rows)}")
        seconds += elapsed
        against = None
        if reference is not None:
            against = _logits(reference, row, f"the reference, window {done + 1} of {len(rows)}")[
                0
            ].to(logits.device)
            if against.shape != logits.shape:
                raise ValueError(
                    f"the model has a vocabulary of {logits.shape[-1]} tokens, the reference of "
                    f"{against.shape[-1]}; "
                    "compare models with the same tokenizer"
                )
        targets = row[1:].to(logits.device)
        sums["nll"] += total_nll(logits[:-1], targets)
        if against is not None:
            sums["reference_nll"] += total_nll(against[:-1], targets)
            for name, total in comparison(against[:-1], logits[:-1]).items():
                sums[name] += total
        if on_window is not None:
            on_window(done + 1, len(rows))
    count = len(rows) * (seq_len - 1)
    mean = {name: total / count for name, total in sums.items()}
    compared = reference is not None
    return Evaluation(
        perplexity=_exp(mean["nll"]),
        nll=mean["nll"],
        kl=mean["kl"] if compared else None,
        kl_top25=mean["kl_top25"] if compared else None,
        top1_agreement=mean["top1_agreement"] if compared else None,
        reference_perplexity=_exp(mean["reference_nll"]) if compared else None,
        reference_nll=mean["reference_nll"] if compared else None,
        tokens=count,
        windows=len(rows),
        seq_len=seq_len,
        seconds=seconds,
    )


def comparison(
    reference: Float[Tensor, "tokens vocab"], logits: Float[Tensor, "tokens vocab"]
) -> dict[str, float]:
    """Sums over tokens of ``kl`` and ``kl_top25`` in nats, and of ``top1_agreement``: how many
    tokens both find most likely."""
    sums = {"kl": 0.0, "kl_top25": 0.0, "top1_agreement": 0.0}
    for part in _chunks(len(logits)):
        sums["kl"] += float(kl_divergence(reference[part], logits[part]).sum())
        sums["kl_top25"] += float(kl_top(reference[part], logits[part]).sum())
        sums["top1_agreement"] += float(same_top1(reference[part], logits[part]).sum())
    return sums


def total_nll(logits: Float[Tensor, "tokens vocab"], targets: Int64[Tensor, "tokens"]) -> float:
    """The sum of :func:`nll`, in parts that bound memory."""
    return sum(float(nll(logits[part], targets[part]).sum()) for part in _chunks(len(targets)))


def check_logits(logits: Tensor, where: str) -> None:
    """Raise ValueError for NaN or +infinity; ``where`` they are from."""
    if bool(logits.isnan().any()) or bool(logits.isposinf().any()):
        raise ValueError(
            f"{where}: NaN or infinite logits; the weights are damaged, or the dtype is too "
            "narrow: try --dtype float32"
        )


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf  # a broken model must not end in OverflowError


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + POSITIONS, count)) for start in range(0, count, POSITIONS))


def _logits(model: nn.Module, row: Tensor, where: str) -> tuple[Tensor, float]:
    """Logits (seq, vocab) of one window, and the seconds that they took."""
    embedding = model.get_input_embeddings()  # pyright: ignore[reportCallIssue] - every model of transformers has it
    device, vocabulary = embedding.weight.device, embedding.weight.shape[0]
    if int(row.max()) >= vocabulary:
        raise ValueError(
            f"{where}: token id {int(row.max())} is outside the vocabulary of {vocabulary}; "
            "the tokenizer belongs to another model"
        )
    start = time.perf_counter()
    logits = model(input_ids=row.unsqueeze(0).to(device), use_cache=False).logits[0]
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    elapsed = time.perf_counter() - start
    check_logits(logits, where)
    return logits, elapsed
