"""What is said of tuning, and how files keep it."""

import json

from ptq.checkpoint.tuning_report import TuningReport, TuningState
from ptq.reading.schema import check, plain


def report(**given: object) -> TuningReport:
    usual: dict[str, object] = {
        "steps": 100, "done": 60, "tokens": 204800, "held_out_tokens": 8192,
        "held_out": ((0, 0.5), (20, 0.4), (40, 0.25), (60, 0.3)),
        "kept": 40, "flipped": 0.0123, "seconds": 1.5,
    }  # fmt: skip
    return TuningReport(**(usual | given))


def test_a_line_says_what_was_gained() -> None:
    assert (report().before, report().after) == (0.5, 0.25)
    assert str(report()) == (
        "40 of 100 steps, KL on 8192 held-out tokens of the calibration text 0.5 -> 0.25, 1.23% of "
        "the codes changed"
    )


def test_a_line_says_in_whose_manner() -> None:
    assert str(report(codes="pv")).startswith("40 of 100 steps in the manner of PV-Tuning, KL on")
    lost = report(codes="pv", held_out=((0, 0.5),), done=3, kept=0)
    assert str(lost).startswith("3 steps in the manner of PV-Tuning gained nothing")


def test_reports_before_there_was_a_choice_are_of_latents() -> None:
    written = report().to_dict()
    del written["codes"]
    assert check(json.loads(json.dumps(written)), TuningReport, "report") == report()


def test_a_line_says_that_nothing_was_gained() -> None:
    kept = report(held_out=((0, 0.5), (20, 0.7), (40, 0.6)), kept=0, flipped=0.0)
    assert "gained nothing" in str(kept) and "0.5 and at best 0.6" in str(kept)
    assert kept.after == kept.before


def test_files_give_back_what_was_written() -> None:
    state = TuningState(report(), "tuning-00060.safetensors", "ab")
    assert check(json.loads(json.dumps(plain(state))), TuningState, "progress") == state
    assert report().to_dict()["held_out"][1] == [20, 0.4]
