"""From the name of a model to its directory, and from a directory to a model and tokenizer, our own
or others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ptq.checkpoint.dialects import READ
from ptq.checkpoint.reader import read_config
from ptq.model.checkpoint_source import CheckpointSource
from ptq.model.structure import positions, resolve
from ptq.runtime.load import Prefill, load
from ptq.text.windows import load_text, load_tokenizer

DEMO = "demo"
LONGEST_WINDOW = 2048


def demo_path() -> Path:
    """The directory of the bundled model.

    Raises:
        FileNotFoundError: it is not installed.
    """
    path = Path(__file__).parent.parent / "demo"
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"the bundled model is not in {path}; install ptq-llm again")
    return path


def resolve_model(name: str | Path, revision: str | None = None) -> Path:
    """The directory of a model: the bundled one for ``demo``, a directory itself, else a model of
    the hub or its cache.

    Args:
        revision: branch, tag or commit of a model of the hub.

    Raises:
        FileNotFoundError: none of the three exists.
        ValueError: a revision of what does not come from the hub.
    """
    return resolve(demo_path() if str(name) == DEMO else name, revision)


@dataclass(frozen=True)
class Loaded:
    """A model that can run, and its tokenizer."""

    name: str
    module: nn.Module
    tokenizer: PreTrainedTokenizerBase

    def encode(self, text: str) -> list[int]:
        """The token ids of ``text``, without a start token."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, special tokens left out."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    @property
    def chats(self) -> bool:
        """Whether the tokenizer knows how a conversation is written for this model."""
        return bool(getattr(self.tokenizer, "chat_template", None))

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids of a conversation, up to where the model is to answer.

        Args:
            messages: ``role`` (system, user, assistant) and ``content`` of each turn.

        Raises:
            ValueError: no chat template, or one that refuses these messages.
        """
        if not self.chats:
            raise ValueError(
                f"{self.name} has no chat template: it continues text and does not answer; use "
                "ptq generate, or a model that was trained for conversations"
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except (TemplateError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(
                f"the chat template of {self.name} refuses the conversation: {reason}"
            ) from error
        return self.encode(str(text))

    @property
    def positions(self) -> int | None:
        """The most tokens that the model takes at a time, if its configuration says."""
        return positions(self.module.config)  # pyright: ignore[reportArgumentType]

    @property
    def ends(self) -> frozenset[int]:
        """The tokens that end a text: those of the generation settings, and the tokenizer's, with
        which chat templates end a turn."""
        settings = getattr(self.module, "generation_config", None)
        ids = getattr(settings, "eos_token_id", None)
        ids = [*(ids if isinstance(ids, list) else [ids]), self.tokenizer.eos_token_id]
        return frozenset(i for i in ids if isinstance(i, int))

    def window(self, seq_len: int | None) -> int:
        """The length of evaluation windows: ``seq_len``, or what is usual and the model can take.

        Raises:
            ValueError: the model has fewer positions.
        """
        limit = self.positions
        if seq_len is not None and limit is not None and seq_len > limit:
            raise ValueError(
                f"--seq-len {seq_len} is more than the {limit} positions of {self.name}; lower it"
            )
        if seq_len is not None:
            return seq_len
        return min(LONGEST_WINDOW, limit or LONGEST_WINDOW)


def load_model(
    name: str | Path,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    bits: int | None = None,
    prefill: Prefill = "16-bit",
) -> Loaded:
    """Load a model for evaluation: layers of our checkpoints compute what their recipe says,
    quantized inputs included.

    Args:
        dtype: of the computation; None is float32 on the CPU, and the checkpoint's own elsewhere.
        bits: of the weights, of a checkpoint with nested codes; see :func:`ptq.runtime.load.load`.
        prefill: what many tokens are multiplied in, as there.

    Raises:
        FileNotFoundError, ValueError: no such model, or a directory that holds none that can be
            used.
    """
    path = resolve_model(name)
    if dtype is None and device.type == "cpu":
        dtype = torch.float32
    quantization = read_config(path).get("quantization_config")
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    if isinstance(method, str) and method in READ:
        module = load(path, device, dtype=dtype, inputs="quantized", bits=bits, prefill=prefill)
    elif prefill != "16-bit":
        raise ValueError(f"{name} is not quantized by ptq: it has no weights to copy to fp8")
    elif bits is not None:
        raise ValueError(f"{name} is not quantized by ptq: it has no two widths to choose from")
    else:
        module = _load_original(path, device, dtype)
    return Loaded(str(name), module.eval(), load_tokenizer(path))


def _load_original(path: Path, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """A model of transformers as it is. ``CheckpointSource`` looks first, because its errors name
    the file and the remedy."""
    source = CheckpointSource(path)
    source.check()
    model_and_info = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype or source.dtype, local_files_only=True, output_loading_info=True
    )
    model, info = cast(tuple[nn.Module, dict[str, set[str]]], model_and_info)
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(f"{path} has no tensor {missing[0]}; the copy is incomplete")
    return model.to(device)


def tokenize(
    model: Loaded, text: str, reference: Loaded | None = None, field: str | None = None
) -> Tensor:
    """The evaluation text (a file, or ``builtin``) as token ids.

    Raises:
        ValueError: the reference has another vocabulary, or the text cannot be read.
    """
    if reference is not None and model.tokenizer.get_vocab() != reference.tokenizer.get_vocab():
        raise ValueError(
            f"{model.name} and {reference.name} have different vocabularies "
            f"({len(model.tokenizer)} and "
            f"{len(reference.tokenizer)} tokens); compare models with the same tokenizer"
        )
    return torch.tensor(model.encode(load_text(text, field=field)), dtype=torch.long)
