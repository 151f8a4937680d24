"""Tasks of lm-eval on a model, its original beside it; lm-eval is an extra that is imported here
alone.

Quantized inputs are emulated exactly, as in ``ptq eval``. A task is a name that lm-eval knows, or a
YAML file of one: with ``data_files`` of this machine it needs no network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ptq.runtime.loaded_model import Loaded
from ptq.runtime.tables import Table, Tabular

MODULE = "lm_eval"


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A metric of a task.

    Attributes:
        error: standard error, as lm-eval gives it; None if it gives none.
        reference: the same metric of the original, if there is one.
        samples: how many questions.
    """

    task: str
    metric: str
    value: float
    error: float | None
    reference: float | None = None
    samples: int | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class TaskResults(Tabular):
    """All metrics of all tasks, in their order."""

    model: str
    reference: str | None
    results: tuple[TaskResult, ...]

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def tables(self) -> tuple[Table, ...]:
        """One, a row for each metric."""
        compared = self.reference is not None
        rows = tuple(
            (
                f"{r.task}, {r.metric}",
                f"{r.value:.4g}",
                "" if r.error is None else f"{r.error:.2g}",
                *(("" if r.reference is None else f"{r.reference:.4g}",) if compared else ()),
                "" if r.samples is None else str(r.samples),
            )
            for r in self.results
        )
        columns = ("task", "value", "± error", *(("original",) if compared else ()), "samples")
        return (Table(title=self.model, columns=columns, rows=rows),)


def check_tasks(tasks: Sequence[str], files: Path | None = None) -> Any:
    """lm-eval's manager of tasks, in which all of ``tasks`` were found.

    Args:
        files: a directory of task files to look in besides lm-eval's own.

    Raises:
        ValueError: lm-eval is not installed, or does not know a task.
        FileNotFoundError: there is no such directory.
    """
    if find_spec(MODULE) is None:
        raise ValueError(
            "--tasks needs lm-eval, which is not installed: pip install 'ptq-llm[lm-eval]'"
        )
    if files is not None and not files.is_dir():
        raise FileNotFoundError(f"--task-files {files} is no directory")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if files is None else str(files))
    known = set(manager.all_tasks)
    for task in tasks:
        if task not in known and not Path(task).is_file():
            raise ValueError(
                f"lm-eval knows no task {task!r}, and there is no such file; lm-eval ls tasks "
                "lists those that it knows"
            )
    return manager


def run_tasks(
    model: Loaded,
    tasks: Sequence[str],
    *,
    reference: Loaded | None = None,
    files: Path | None = None,
    limit: int | None = None,
    batch_size: int = 1,
) -> TaskResults:
    """Let ``model`` do ``tasks``, and its original too if there is one.

    Args:
        tasks: names, or YAML files.
        files: see :func:`check_tasks`.
        limit: at most so many questions of each.

    Raises:
        ValueError, FileNotFoundError: see :func:`check_tasks`; a task cannot be read, or its data
            cannot be had.
    """
    manager = check_tasks(tasks, files)
    found = _metrics(model, tasks, manager, limit, batch_size)
    original = {} if reference is None else _metrics(reference, tasks, manager, limit, batch_size)
    results = tuple(
        TaskResult(
            task=task,
            metric=metric,
            value=value,
            error=error,
            reference=original[task, metric][0] if (task, metric) in original else None,
            samples=samples,
        )
        for (task, metric), (value, error, samples) in found.items()
    )
    return TaskResults(model=model.name, reference=reference and reference.name, results=results)


def _metrics(
    model: Loaded, tasks: Sequence[str], manager: Any, limit: int | None, batch_size: int
) -> dict[tuple[str, str], tuple[float, float | None, int | None]]:
    """(value, standard error, samples) by task and metric."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    assert isinstance(model.module, PreTrainedModel)
    wrapped = HFLM(
        pretrained=model.module,
        tokenizer=model.tokenizer,  # pyright: ignore[reportArgumentType] - of either kind
        backend="causal",
        batch_size=batch_size,
        max_length=model.window(None),
    )
    try:
        answer = simple_evaluate(
            model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
        )
    except (OSError, KeyError) as error:  # the data set: not there, or nobody answers
        raise ValueError(f"the tasks cannot be run: {type(error).__name__}: {error}") from error
    assert answer is not None  # of the first process, which this is
    return table(answer)


def table(
    answer: Mapping[str, Any],
) -> dict[tuple[str, str], tuple[float, float | None, int | None]]:
    """Of lm-eval's answer, whose keys are ``metric,filter`` and ``metric_stderr,filter``."""
    found = {}
    for task, metrics in answer["results"].items():
        samples = answer.get("n-samples", {}).get(task, {}).get("effective")
        for key, value in metrics.items():
            name, comma, kind = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = metrics.get(f"{name}_stderr,{kind}")
            shown = name if kind == "none" else f"{name} ({kind})"
            deviation = float(error) if isinstance(error, int | float) else None
            found[task, shown] = float(value), deviation, samples
    return found
