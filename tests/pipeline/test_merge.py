"""Two fine-tuned copies of the bundled model, merged; and what may not be merged."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from ptq.checkpoint.checksums import differences
from ptq.model.weight_files import Shards
from ptq.numerics.merging import singular
from ptq.pipeline import merge as module
from ptq.pipeline.merge import METHODS, merge
from ptq.pipeline.recipe import Recipe
from ptq.pipeline.run import quantize_model
from ptq.text.windows import load_tokenizer

WORDS = ["north", "south", "east", "west", "river", "hill", "stone", "cloud"]


def sums(generator: random.Random) -> str:
    a, b = generator.randrange(20), generator.randrange(20)
    return f"Question: {a} plus {b}? Answer: {a + b}."


def walks(generator: random.Random) -> str:
    return "we went " + ", then ".join(generator.choices(WORDS, k=4)) + "; it was far"


def windows(tokenizer, make: Callable[[random.Random], str], seed: int, count: int) -> Tensor:
    generator = random.Random(seed)
    ids: list[int] = []
    while len(ids) < count * 64:
        ids += tokenizer(make(generator) + "\n", add_special_tokens=False)["input_ids"]
    return torch.tensor(ids[: count * 64]).view(count, 64)


def loss(model, ids: Tensor) -> Tensor:
    logits = model(ids).logits[:, :-1].float()
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture(scope="module")
def tuned(demo_model: Path, tmp_path_factory) -> dict[str, tuple[Path, Tensor]]:
    """By task: a copy of the bundled model after a few steps, and other text of the same kind."""
    tokenizer = load_tokenizer(demo_model)
    made = {}
    for name, make in (("sums", sums), ("walks", walks)):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.0)
        for batch in windows(tokenizer, make, 1, 48).split(8) * 2:
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
        path = tmp_path_factory.mktemp(name)
        model.to(torch.bfloat16).save_pretrained(path)
        tokenizer.save_pretrained(path)
        made[name] = (path, windows(tokenizer, make, 2, 8))
    return made


def losses(path: Path, tuned: dict[str, tuple[Path, Tensor]]) -> dict[str, float]:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return {name: float(loss(model, ids)) for name, (_, ids) in tuned.items()}


@pytest.mark.parametrize("method", METHODS)
def test_the_merged_model_can_do_what_both_parts_can(
    demo_model: Path, tuned, tmp_path: Path, method: str
) -> None:
    parts = [path for path, _ in tuned.values()]
    done = merge(demo_model, parts, tmp_path / "out", method=method)
    assert done.tensors == 38 and done.matrices == 28
    assert {p.name for p in tmp_path.iterdir()} == {"out"}
    assert list(differences(tmp_path / "out")) == []
    before, after = losses(demo_model, tuned), losses(tmp_path / "out", tuned)
    own = {name: losses(path, tuned)[name] for name, (path, _) in tuned.items()}
    for name in tuned:
        # most of what its own training gained on a text is kept
        assert after[name] < before[name] - 0.5 * (before[name] - own[name]), (name, before, after)
    stored = Shards(tmp_path / "out")
    original = Shards(demo_model)
    assert stored.names() == original.names()
    for name in stored.names():
        assert stored.dtype(name) == original.dtype(name) == torch.bfloat16
    if method == "arithmetic":
        recipe = Recipe.default("nvfp4", algorithm="rtn")
        quantize_model(tmp_path / "out", tmp_path / "quantized", recipe=recipe)


def changed(model: Path, to: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    shutil.copytree(model, to)
    file = to / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return to


def nudged(model: Path, to: Path) -> Path:
    def nudge(tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor + 0.01 * torch.randn(tensor.shape).to(tensor.dtype)

    return changed(model, to, nudge)


def test_every_tensor_is_rounded_once(make_tiny_model, tmp_path: Path) -> None:
    model = make_tiny_model("llama", dtype=torch.bfloat16)
    parts = [nudged(model, tmp_path / f"part-{i}") for i in range(2)]
    merge(model, parts, tmp_path / "sum", strength=0.7)
    merge(model, parts, tmp_path / "tsvm", method="tsvm", strength=0.7)
    base, one, two = (load_file(p / "model.safetensors") for p in (model, *parts))
    summed, turned = (load_file(tmp_path / n / "model.safetensors") for n in ("sum", "tsvm"))
    for name, start in base.items():
        deltas = [other[name].float() - start.float() for other in (one, two)]
        change = deltas[0].double() + deltas[1].double()
        expected = (start.double() + 0.7 * change).bfloat16()
        assert torch.equal(summed[name], expected)
        change = singular(deltas) if "layers" in name and start.ndim == 2 else change / 2
        assert torch.equal(turned[name], (start.double() + 0.7 * change).bfloat16())


def test_shards_are_as_large_as_asked_for(make_tiny_model, tmp_path: Path) -> None:
    model = make_tiny_model("llama")
    parts = [nudged(model, tmp_path / f"part-{i}") for i in range(2)]
    told = []

    def on_tensor(*step) -> None:
        told.append(step)

    merge(model, parts, tmp_path / "one")
    merge(model, parts, tmp_path / "out", shard_bytes=100_000, on_tensor=on_tensor)
    whole, split = Shards(tmp_path / "one"), Shards(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    assert whole.names() == split.names()
    assert all(torch.equal(whole.tensor(n), split.tensor(n)) for n in whole.names())
    count = len(whole.names())
    assert [step[:2] for step in told] == [(i + 1, count) for i in range(count)]


def test_what_is_no_copy_is_refused_and_leaves_nothing(
    make_tiny_model, demo_model: Path, make_run, tmp_path: Path
) -> None:
    base = make_tiny_model("llama")
    out = tmp_path / "out"
    norm = "model.norm.weight"
    gone = changed(base, tmp_path / "gone", lambda t: t.pop(norm))
    with pytest.raises(ValueError, match=r"model\.norm"):
        merge(base, [base, gone], out)
    shorter = make_tiny_model("llama", hidden_size=32)
    with pytest.raises(ValueError, match=r"only copies of one model can be merged"):
        merge(base, [base, shorter], out)
    with pytest.raises(ValueError, match=r"is a qwen2 and .* a llama"):
        merge(base, [base, make_tiny_model("qwen2")], out)
    with pytest.raises(ValueError, match="two or more fine-tuned models"):
        merge(base, [base], out)
    with pytest.raises(ValueError, match="unknown method 'ties'; choose from arithmetic, tsvm"):
        merge(base, [base, base], out, method="ties")
    with pytest.raises(ValueError, match="--strength must be a positive number"):
        merge(base, [base, base], out, strength=float("nan"))
    make_run("llama", "nvfp4")(tmp_path / "packed", dialect="ptq")
    with pytest.raises(ValueError, match="quantized"):
        merge(base, [base, tmp_path / "packed"], out)
    other = tmp_path / "vocabulary"
    shutil.copytree(base, other)
    words = json.loads((other / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    a, b = list(vocabulary)[:2]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(words))
    with pytest.raises(ValueError, match="another vocabulary"):
        merge(base, [base, other], out)
    with pytest.raises(FileExistsError, match=r"not empty: choose another directory$"):
        merge(demo_model, [base, base], base)
    with pytest.raises(ValueError, match="lies in the directory of the model"):
        merge(base, [base, gone], gone / "out")
    assert not out.exists() and not (tmp_path / "out.partial").exists()


def test_a_merge_that_fails_midway_leaves_nothing(
    make_tiny_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_tiny_model("llama", dtype=torch.float16)

    def largest(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"].fill_(60000)

    far = changed(base, tmp_path / "far", largest)
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not finite when merged"):
        merge(base, [far, far], out, strength=2.0)
    assert {p.name for p in tmp_path.iterdir()} == {"far"}

    def stops(*args) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "_write_rest", stops)
    with pytest.raises(KeyboardInterrupt):
        merge(base, [base, base], out)
    assert {p.name for p in tmp_path.iterdir()} == {"far"}
    monkeypatch.undo()
    out.mkdir()
    (out / "mine.txt").write_text("x")
    with pytest.raises(FileExistsError, match="not empty"):
        merge(base, [base, base], out)
    assert (out / "mine.txt").read_text() == "x"


def test_experts_are_merged_one_by_one(make_tiny_model, tmp_path: Path) -> None:
    base = make_tiny_model("mixtral")
    parts = [nudged(base, tmp_path / str(i)) for i in range(2)]
    done = merge(base, parts, tmp_path / "out", method="tsvm")
    assert done.matrices >= 2 * (4 + 1)
    assert losses_are_finite(tmp_path / "out")


def losses_are_finite(path: Path) -> bool:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    with torch.no_grad():
        return bool(torch.isfinite(model(torch.arange(20).view(1, 20)).logits).all())
