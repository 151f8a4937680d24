"""What tuning did to a checkpoint, as ``ptq_report.json`` keeps it, and how far an unfinished one
is."""

from dataclasses import dataclass

from ptq.reading.schema import Count, Finite, Share, plain


@dataclass(frozen=True, kw_only=True)
class TuningReport:
    """How codes and norms were distilled from the original model.

    Attributes:
        codes: how they were moved, a key of :data:`ptq.pipeline.recipe.TUNED_BY`.
        steps: asked for; ``done``: taken, fewer where held-out text no longer gained.
        tokens: of the text that was trained on, every window counted once; ``held_out_tokens``: of
            the text that it was judged by.
        held_out: (steps taken, KL(original ‖ quantized) in nats per token on held-out text), the
            first before any step.
        kept: the steps after which the result was kept; 0 where none was better than what was
            there before.
        flipped: share of the codes that differ from those before, in what was kept.
        seconds: wall time.
    """

    steps: Count
    done: int
    tokens: int
    held_out_tokens: int
    held_out: tuple[tuple[int, Finite], ...]
    kept: int
    flipped: Share
    seconds: float
    codes: str = "latents"

    @property
    def before(self) -> float:
        """Held-out KL before tuning."""
        return self.held_out[0][1]

    @property
    def after(self) -> float:
        """Held-out KL of what was kept."""
        return dict(self.held_out)[self.kept]

    @property
    def _manner(self) -> str:
        return " in the manner of PV-Tuning" if self.codes == "pv" else ""

    def __str__(self) -> str:
        if not self.kept:
            tried = min((kl for step, kl in self.held_out if step), default=self.before)
            return (
                f"{self.done} steps{self._manner} gained nothing: KL on held-out calibration text "
                f"was {self.before:.4g} and at best {tried:.4g}; codes and norms stay as they were"
            )
        return (
            f"{self.kept} of {self.steps} steps{self._manner}, KL on {self.held_out_tokens} "
            f"held-out tokens of the calibration text {self.before:.4g} -> {self.after:.4g}, "
            f"{self.flipped:.2%} of the codes changed"
        )

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values."""
        return plain(self)


@dataclass(frozen=True)
class TuningState:
    """Tuning that goes on, with the file of all that it needs for that and its hash; without one it
    is finished, and its result is in the blocks."""

    report: TuningReport
    file: str | None = None
    sha256: str | None = None
