"""Generation: the cached loop against running everything again, sampling, and text that arrives in
pieces."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ptq.runtime.decoding import Watch
from ptq.runtime.generate import choose, generate, record, room, stream_text


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_llama).eval()


def test_greedy_is_what_the_whole_sequence_gives(model: nn.Module):
    """The cache changes nothing: each token is the most likely one after all tokens before it."""
    prompt = [10, 20, 30]
    tokens = list(generate(model, prompt, max_new_tokens=10))
    for i, token in enumerate(tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens[:i]]), use_cache=False).logits
        assert int(logits[0, -1].argmax()) == token


def test_generation_stops_before_an_end_token(model: nn.Module):
    tokens = list(generate(model, [10, 20, 30], max_new_tokens=10))
    end = tokens[4]
    assert (
        list(generate(model, [10, 20, 30], max_new_tokens=10, stop=[end]))
        == tokens[: tokens.index(end)]
    )


def test_generation_stops_where_the_positions_end(model: nn.Module):
    """256 positions: after 250 tokens, six more can be read, and a seventh follows them."""
    prompt = [10] * 250
    assert room(model, prompt) == 7
    assert len(list(generate(model, prompt, max_new_tokens=20))) == 7
    assert len(list(generate(model, [10] * 256, max_new_tokens=20))) == 1
    with pytest.raises(ValueError, match="the prompt has 257 tokens and the model 256 positions"):
        list(generate(model, [10] * 257))


def test_a_model_that_names_no_positions_has_room_for_ever():
    assert room(nn.Identity(), [1]) is None


def test_a_seed_decides(model: nn.Module):
    draws = [
        list(generate(model, [1], max_new_tokens=8, temperature=1.0, seed=seed))
        for seed in (3, 3, 4)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_temperature_sharpens():
    """Draws follow softmax(logits / T): their frequencies are those of the distribution, within
    five deviations."""
    logits = torch.tensor([0.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits.double() / temperature).softmax(0)
        draws = torch.tensor([choose(logits, temperature, generator) for _ in range(2000)])
        found = torch.bincount(draws, minlength=3) / 2000
        assert float((found - expected).abs().max()) < 5 * 0.5 / 2000**0.5
    assert choose(logits, 0.0, generator) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": []}, "no tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_new_tokens": 0}, "max-new-tokens"),
    ],
)
def test_bad_options(model: nn.Module, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        list(generate(model, **{"prompt": [1], **options}))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers(bad: float, temperature: float):
    with pytest.raises(ValueError, match="NaN or infinite logits"):
        choose(torch.tensor([0.0, bad, 1.0]), temperature, torch.Generator())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_choices_are_those_of_their_definition(dtype: torch.dtype):
    """argmax, the first of equal ones; else one draw of the seed's generator from the softmax in
    float64."""
    logits = (4 * torch.randn(1000)).to(dtype)
    logits[3] = -torch.inf  # a token that is ruled out is none that is damaged
    logits[[500, 700]] = logits.max() + 1
    assert choose(logits, 0.0, torch.Generator()) == 500
    for temperature in (0.3, 1.0):
        expected = torch.multinomial(
            (logits.double() / temperature).softmax(-1), 1, generator=generator_of(5)
        )
        assert choose(logits, temperature, generator_of(5)) == int(expected)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_most_likely_token_and_the_check_come_to_the_host_together():
    """No value is read on its own: each would wait for the device."""
    with Watch() as watch:
        assert choose(torch.tensor([0.0, 2.0, 1.0]), 0.0, torch.Generator()) == 1
    assert not watch.waiting


def by_bytes(ids: list[int]) -> str:
    """A decoder whose tokens are bytes."""
    return bytes(ids).decode("utf-8", "replace")


def dropping_a_space(ids: list[int]) -> str:
    """A decoder that drops the space at the start of a text, as those of SentencePiece do."""
    return "".join([" the", " walk", "s", " on"][i] for i in ids).removeprefix(" ")


def test_characters_of_several_tokens_arrive_whole():
    text = "naïve ‖ΔW‖ 漢字"
    pieces = list(stream_text(by_bytes, list(b"so "), list(text.encode())))
    assert "".join(pieces) == text
    assert pieces == list(text)


def test_an_unfinished_character_comes_at_the_end():
    assert "".join(stream_text(by_bytes, [], list("né".encode())[:-1])) == "n\ufffd"


def test_spaces_between_tokens_stay():
    assert "".join(stream_text(dropping_a_space, [0], [1, 2, 3, 0])) == " walks on the"


def test_decoding_is_linear_in_the_length():
    """No call decodes more than a few tokens, however long the text gets."""
    longest = 0

    def decode(ids: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return by_bytes(ids)

    assert len("".join(stream_text(decode, [65] * 500, [66] * 500))) == 500
    assert longest < 20


def test_recorded_tokens_are_those_that_passed():
    made: list[int] = []
    assert list(record(iter([1, 2, 3]), made)) == made == [1, 2, 3]


def test_the_model_is_fed_one_token_at_a_time(model: nn.Module):
    lengths: list[int] = []

    def count(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
        lengths.append(kwargs["input_ids"].shape[1])

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    list(generate(model, [1, 2, 3], max_new_tokens=4))
    handle.remove()
    assert lengths == [3, 1, 1, 1]


def test_a_tiny_temperature_takes_the_most_likely_token():
    generator = torch.Generator().manual_seed(0)
    assert choose(torch.tensor([1.0, 3.0, 2.0]), 1e-308, generator) == 1
