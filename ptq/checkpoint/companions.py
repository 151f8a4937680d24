"""What is copied beside the weights as it is: tokenizer, generation settings, licence, code."""

import json
from pathlib import Path

COMPANIONS = (
    "generation_config.json", "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template*", "*.model", "*.tiktoken", "*preprocessor_config.json",
    "processor_config.json", "*.py", "LICENSE*", "NOTICE*",
)  # fmt: skip


def companion_files(source: Path) -> list[Path]:
    """The files of a model directory that belong to the model, but are neither weights nor written
    anew.

    Raises:
        ValueError: one is a link that leads out of the directory. A checkpoint is published: a
            model from elsewhere could have any file of this machine copied into it. The links of
            the hub's cache, to the blobs of the same model, are followed.
    """
    home = source.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    found = {path for pattern in COMPANIONS for path in source.glob(pattern) if path.is_file()}
    for path in sorted(found):
        target = path.resolve()
        if not any(target.is_relative_to(root) for root in roots):
            raise ValueError(
                f"{path} is a link to {target}, outside of the model, and would be copied into the "
                "result: put the file itself in its place, or delete the link"
            )
    return sorted(found)


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer beside a checkpoint knows how a conversation is written."""
    if (folder / "chat_template.jinja").is_file():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and "chat_template" in json.loads(settings.read_text("utf-8"))
