"""Train the bundled demo model from scratch on the Python standard library's own source text.

A 3.7M-parameter Llama (grouped-query attention, SwiGLU, RMSNorm, tied embeddings) with a byte-level
BPE of 4096 tokens. Held-out files (chosen by a hash of their path,
``ptq.text.windows.is_held_out``) are never trained on; a part of them becomes ``heldout.txt``, the
built-in evaluation text.

    python scripts/train_demo_model.py --out ptq/demo --minutes 80

The learning rate follows the elapsed time (constant, then linear to zero over the last 40 %), so
that any budget ends in a finished model. Matrices are trained with Muon, embeddings and norms with
AdamW.
"""

import argparse
import json
import math
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ptq.text.windows import is_held_out

VOCABULARY, CONTEXT = 4096, 512
END = "<|endoftext|>"
HELD_OUT_CHARACTERS = 200_000


def sources() -> tuple[list[str], list[str]]:
    """Texts of the standard library: (training, held out). Held out are no test modules: they
    repeat themselves."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = [], []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root).as_posix()
        if "site-packages/" in relative or "bad_coding" in relative or "badsyntax" in relative:
            continue
        text = path.read_bytes().decode("utf-8", "replace").replace("\r\n", "\n")
        if len(text) < 200 or len(text) > 400_000:
            continue
        if not is_held_out(relative):
            train.append(text)
        elif "test" not in relative:
            held_out.append(text)
    return train, held_out


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> np.ndarray:
    end = tokenizer.convert_tokens_to_ids(END)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return np.concatenate([np.array([end, *ids], dtype=np.uint16) for ids in encoded])


def loss_of(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    with torch.autocast("cpu" if batch.device.type == "cpu" else "cuda", dtype=torch.bfloat16):
        logits = model(batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten()
    )


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: np.ndarray, device: str) -> float:
    windows = torch.from_numpy(tokens[: len(tokens) // CONTEXT * CONTEXT].astype(np.int64)).view(
        -1, CONTEXT
    )
    windows = windows[:: max(1, len(windows) // 64)][:64].to(device)
    return float(np.mean([float(loss_of(model, w)) for w in windows.split(16)]))


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """With random weights, by torch's generator."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            rms_norm_eps=1e-5,
        )
    )


def new_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for embeddings and norms, with their largest learning rates."""
    matrices = [
        p
        for n, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in n and "lm_head" not in n
    ]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    return [
        torch.optim.Muon(
            matrices, lr=0.02, momentum=0.95, weight_decay=0.01, adjust_lr_fn="original"
        ),
        torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument(
        "--threads", type=Path, help="a file whose number of CPU threads is read before every step"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)

    texts, held_out_texts = sources()
    tokenizer = train_tokenizer(texts)
    train, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_texts)
    print(
        f"{len(train) / 1e6:.2f}M training tokens, {len(held_out) / 1e3:.0f}k held out", flush=True
    )

    model = new_model(tokenizer).to(args.device)
    optimizers = new_optimizers(model)
    base = [o.param_groups[0]["lr"] for o in optimizers]

    generator = np.random.default_rng(0)
    windows = len(train) // CONTEXT - 1
    start, step, epoch = time.monotonic(), 0, np.empty(0, dtype=np.int64)
    running = math.nan
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        if args.threads and args.threads.exists():
            torch.set_num_threads(int(args.threads.read_text()))
        if len(epoch) < args.batch:  # every window once per pass, at a random offset
            epoch = generator.permutation(windows) * CONTEXT + generator.integers(CONTEXT)
        offsets, epoch = epoch[: args.batch], epoch[args.batch :]
        batch = torch.from_numpy(
            np.stack([train[o : o + CONTEXT] for o in offsets]).astype(np.int64)
        ).to(args.device)
        rate = min(1.0, (step + 1) / 50) * min(1.0, (1 - progress) / 0.4)
        for optimizer, lr in zip(optimizers, base, strict=True):
            optimizer.param_groups[0]["lr"] = lr * rate
        loss = loss_of(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.item() if math.isnan(running) else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 100 == 0:
            seconds = time.monotonic() - start
            rate_ = step * args.batch * CONTEXT / seconds
            line = f"step {step} {seconds / 60:.1f} min, {rate_:.0f} tokens/s, loss {running:.3f}"
            print(
                line
                + (
                    f", held out {held_out_loss(model, held_out, args.device):.3f}"
                    if step % 500 == 0
                    else ""
                ),
                flush=True,
            )
    print(
        f"held out {held_out_loss(model, held_out, args.device):.4f} after {step} steps", flush=True
    )

    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    text = "".join(held_out_texts)[:HELD_OUT_CHARACTERS]
    (args.out / "heldout.txt").write_text(text, encoding="utf-8")
    print(
        json.dumps(
            {
                "steps": step,
                "tokens": step * args.batch * CONTEXT,
                "held_out": held_out_loss(model, held_out, args.device),
            }
        )
    )


if __name__ == "__main__":
    main()
