"""Records of measurements, and their sums."""

import json
from pathlib import Path

from ptq.bench.layers import Plan, predict
from ptq.bench.measurement import GPUS, append, block_sums, read
from ptq.bench.shapes import block_layers

SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
}


def plan(model: str = "llama-3.1-8b", **choices) -> Plan:
    return Plan(model=model, layers=block_layers(model), **choices)


def test_a_record_survives_its_file(tmp_path: Path) -> None:
    rows = list(predict(plan(tokens=[1, 64], formats=["nvfp4", "nvint4"]), GPUS["h200"]))
    append(tmp_path / "new" / "runs.jsonl", rows[:3])
    append(tmp_path / "new" / "runs.jsonl", rows[3:])
    assert read(tmp_path / "new" / "runs.jsonl") == rows


def test_a_sum_names_the_expert_that_it_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({**SIZES, "num_experts": 4, "moe_intermediate_size": 32})
    )
    sums = block_sums(predict(plan(str(tmp_path), tokens=[1]), GPUS["h200"]))
    assert {m.layer for m in sums} == {"block, 1 expert"}
    dense = block_sums(predict(plan(tokens=[1], backends=["bf16"]), GPUS["h200"]))
    assert [(m.layer, m.flops) for m in dense] == [
        ("block", 2 * (6144 + 4096 + 28672 + 14336) * 4096)
    ]
