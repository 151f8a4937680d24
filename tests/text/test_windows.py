"""Windows of tokens: determinism, where they start, what stands between documents, messages."""

import hashlib
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ptq.text.windows import Calibration, load_calibration, load_text, load_tokenizer

BOS, EOS = 0, 1
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"


def make_tokenizer(*, adds_bos: bool = False, eos: bool = True) -> PreTrainedTokenizerFast:
    """Words w0 … w999 are tokens 3 … 1002; everything else is 2."""
    words = {"<s>": BOS, "</s>": EOS, "<unk>": 2} | {f"w{i}": i + 3 for i in range(1000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BOS)]
        )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>" if eos else None,
        unk_token="<unk>",
    )
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in range(1000)))
    return tmp_path / "text.txt"


@pytest.fixture
def jsonl_file(tmp_path: Path) -> Path:
    """A hundred documents of ten words, w0 … w999 in order."""
    texts = (" ".join(f"w{10 * d + i}" for i in range(10)) for d in range(100))
    lines = [json.dumps({"id": d, "text": text}) for d, text in enumerate(texts)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "docs.jsonl"


def load(
    source: object, tokenizer: PreTrainedTokenizerFast | None = None, **changes: object
) -> Calibration:
    settings = {"samples": 6, "seq_len": 20, "batch_size": 4, "seed": 0} | changes
    return load_calibration(tokenizer or make_tokenizer(), str(source), **settings)  # pyright: ignore[reportArgumentType]


def test_batches_are_full_windows(text_file: Path):
    found = load(text_file)
    assert [tuple(b.shape) for b in found.batches] == [(4, 20), (2, 20)]
    assert all(b.dtype == torch.int64 for b in found.batches)
    assert found.description["tokens"] == 120


def test_windows_of_a_text_are_contiguous_and_do_not_overlap(text_file: Path):
    windows = torch.cat(load(text_file, samples=40).batches)  # 40 · 20 of 1000
    assert (windows.diff(dim=1) == 1).all()
    assert windows.unique().numel() == windows.numel()


def test_windows_overlap_only_when_there_is_too_little_text(text_file: Path):
    plenty, scarce = load(text_file, samples=50), load(text_file, samples=70)
    assert plenty.description["overlapping"] is False
    assert scarce.description["overlapping"] is True
    starts = torch.cat(scarce.batches)[:, 0]
    assert starts[0] == 3 and starts[-1] == 3 + 1000 - 20
    assert starts.unique().numel() == 70


@pytest.mark.parametrize("name", ["text_file", "jsonl_file"])
def test_the_seed_decides_everything(name: str, request: pytest.FixtureRequest):
    path = request.getfixturevalue(name)
    first, again, other = load(path), load(path), load(path, seed=1)
    assert first.description == again.description
    assert all(torch.equal(a, b) for a, b in zip(first.batches, again.batches, strict=True))
    assert first.description["sha256"] != other.description["sha256"]


def test_the_global_generator_is_not_touched(text_file: Path):
    before = torch.get_rng_state()
    load(text_file)
    assert torch.equal(before, torch.get_rng_state())


def test_the_hash_is_that_of_the_ids(text_file: Path):
    found = load(text_file)
    raw = b"".join(int(i).to_bytes(8, "little") for i in torch.cat(found.batches).flatten())
    assert found.description["sha256"] == hashlib.sha256(raw).hexdigest()


def test_documents_are_separated_by_the_end_token(jsonl_file: Path):
    ids = torch.cat(load(jsonl_file, samples=1, seq_len=30).batches)[0].tolist()
    assert EOS in ids and BOS not in ids
    end = ids.index(EOS)
    assert (ids[end + 1] - 3) % 10 == 0  # a document starts here
    assert ids[end + 1 : end + 10] == list(range(ids[end + 1], ids[end + 1] + 9))


def test_windows_start_with_bos_only_if_the_tokenizer_adds_one(jsonl_file: Path):
    with_bos = torch.cat(load(jsonl_file, make_tokenizer(adds_bos=True)).batches)
    assert (with_bos[:, 0] == BOS).all()
    assert with_bos.shape == (6, 20)
    assert not (torch.cat(load(jsonl_file).batches)[:, 0] == BOS).any()


def test_between_documents_bos_stands_in_for_a_missing_end_token(jsonl_file: Path):
    ids = torch.cat(load(jsonl_file, make_tokenizer(eos=False)).batches)
    assert (ids == BOS).any() and not (ids == EOS).any()


def test_chat_messages_are_rendered_and_begin_once(tmp_path: Path):
    talk = [{"role": "w1", "content": "w2 w3"}, {"role": "w4", "content": "w5"}]
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": talk})] * 30))
    ids = torch.cat(load(tmp_path / "chat.jsonl", make_tokenizer(adds_bos=True), samples=2).batches)
    assert ids[0].tolist()[:1] == [BOS]
    assert not ((ids[:, 1:] == BOS) & (ids[:, :-1] == BOS)).any()
    assert {4, 5, 6, 7, 8, BOS, EOS} == set(ids.flatten().tolist())


def test_whole_texts_for_evaluation(text_file: Path, jsonl_file: Path):
    assert load_text(str(text_file)) == text_file.read_text()
    joined = load_text(str(jsonl_file))
    assert joined.startswith("w0 w1") and joined.count("\n\n") == 99


def test_a_generic_tokenizer_is_read_as_it_is(tmp_path: Path):
    make_tokenizer().save_pretrained(tmp_path)
    config = {"model_type": "qwen2"}  # AutoTokenizer would force its class
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path)("w0 w7", add_special_tokens=False)["input_ids"] == [3, 10]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({}, "too short: 3 tokens.*need 120"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"seq_len": -1}, "seq_len must be at least 1"),
    ],
)
def test_mistakes_are_named_in_one_line(changes: dict, message: str, tmp_path: Path):
    (tmp_path / "a.txt").write_text("w1 w2 w3")
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path / "a.txt", **changes)
    assert "\n" not in str(caught.value)


def test_chat_messages_without_a_template_are_refused(tmp_path: Path):
    (tmp_path / "chat.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "w1"}]})
    )
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        load(tmp_path / "chat.jsonl", tokenizer)
    with pytest.raises(ValueError, match="plain text is wanted"):
        load_text(str(tmp_path / "chat.jsonl"))


STRICT = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ m['role'] + ' ' + m['content'] }} {% endfor %}"
)


def test_conversations_that_the_template_refuses_are_skipped_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    good = {"messages": [{"role": "w1", "content": "w2 w3"}]}
    system = {"messages": [{"role": "system", "content": "w9"}]}
    empty = {"messages": [{"role": "w1", "content": None}]}  # a TypeError within the template
    path, tokenizer = tmp_path / "chat.jsonl", make_tokenizer()
    tokenizer.chat_template = STRICT
    path.write_text("\n".join(json.dumps(r) for r in [system, *[good] * 30, empty, good]))
    found = load(path, tokenizer, seed=3, samples=5)
    assert found.description["skipped"] == 2
    assert set(torch.cat(found.batches).flatten().tolist()) == {4, 5, 6, EOS}
    assert "2 of 33 records cannot be used, the first: line " in caplog.text
    assert "chat template" in caplog.text
    path.write_text("\n".join(json.dumps(r) for r in [good, system, system]))
    with pytest.raises(
        ValueError, match=r"too short: 3 tokens.*; 2 of 3 records cannot.*System"
    ) as e:
        load(path, tokenizer)
    assert "\n" not in str(e.value)
    path.write_text(json.dumps(system))
    with pytest.raises(ValueError, match="its only record cannot be used: line 1 is refused by"):
        load(path, tokenizer)


def test_what_is_skipped_in_a_text_to_evaluate_on_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\nnull\n{"text": "two"}')
    assert load_text(str(tmp_path / "a.jsonl")) == "one\n\ntwo"
    assert "1 of 3 records cannot be used, the first: line 2" in caplog.text


def test_a_directory_without_tokenizer_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no tokenizer that can be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="not a directory with a tokenizer"):
        load_tokenizer(tmp_path / "nowhere")


def test_fewer_windows_rather_than_such_as_overlap(tiny_llama: Path, tiny_text: Path) -> None:
    load = partial(
        load_calibration, load_tokenizer(tiny_llama), str(tiny_text), seq_len=64, batch_size=999,
        seed=0,
    )  # fmt: skip
    overlapping, fewer = load(samples=500), load(samples=500, fewer=True)
    assert overlapping.description["overlapping"] and not fewer.description["overlapping"]
    assert 100 < len(fewer.batches[0]) < 130 and fewer.description["samples"] == len(
        fewer.batches[0]
    )
    assert torch.equal(load(samples=5, fewer=True).batches[0], load(samples=5).batches[0])
