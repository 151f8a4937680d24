"""Tasks of lm-eval: with a local task file where lm-eval is installed, its answer read anywhere."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from ptq.runtime import lm_eval_tasks
from ptq.runtime.lm_eval_tasks import TaskResult, TaskResults, check_tasks, run_tasks, table
from ptq.runtime.loaded_model import load_model

ANSWER = {
    "results": {
        "arc": {
            "alias": "arc",
            "acc,none": 0.5,
            "acc_stderr,none": 0.05,
            "acc_norm,none": 0.25,
            "acc_norm_stderr,none": "N/A",
        },
        "gsm8k": {"exact_match,strict-match": 0.125, "exact_match_stderr,strict-match": 0.01},
    },
    "n-samples": {"arc": {"original": 100, "effective": 10}},
}


def test_metrics_are_read_from_the_answer() -> None:
    assert table(ANSWER) == {
        ("arc", "acc"): (0.5, 0.05, 10),
        ("arc", "acc_norm"): (0.25, None, 10),
        ("gsm8k", "exact_match (strict-match)"): (0.125, 0.01, None),
    }


def test_results_are_a_table() -> None:
    row = TaskResult(task="arc", metric="acc", value=0.5, error=0.05, reference=0.625, samples=10)
    shown = str(TaskResults(model="m", reference="r", results=(row,)))
    assert "original" in shown and "arc, acc    0.5     0.05     0.625       10" in shown
    alone = str(TaskResults(model="m", reference=None, results=(row,)))
    assert "original" not in alone


def test_without_lm_eval_a_line_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(lm_eval_tasks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'ptq-llm\[lm-eval\]'$"):
        check_tasks(["arc_easy"])


needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is an extra that is not installed"
)


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Questions with two answers each, on this machine."""
    rows = [{"q": "def f(x):\n    return", "a": [" x", " %%"], "gold": 0}] * 6
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tiny.yaml").write_text(
        f"""
task: tiny_task
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tmp_path / "rows.jsonl"}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{a}}}}"
doc_to_target: gold
metric_list:
  - metric: acc
"""
    )
    return tmp_path / "tiny.yaml"


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_this_machine_needs_no_network(task: Path) -> None:
    model = load_model("demo", device=torch.device("cpu"))
    found = run_tasks(model, [str(task)], reference=model, limit=4)
    (row,) = found.results
    assert (row.task, row.metric, row.samples) == ("tiny_task", "acc", 4)
    assert row.value == row.reference == 1.0  # it has read Python
    by_name = run_tasks(model, ["tiny_task"], files=task.parent, limit=4)
    assert by_name.results[0].value == 1.0


@needs_lm_eval
@pytest.mark.filterwarnings("ignore")
def test_an_unknown_task_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="knows no task 'no_such_task'"):
        check_tasks(["no_such_task"])
    with pytest.raises(FileNotFoundError, match="is no directory"):
        check_tasks(["arc_easy"], tmp_path / "nothing")
