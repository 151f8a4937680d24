"""MXFP4 as ModelOpt writes it, which ptq does not read, as a checkpoint that it reads.

Under a layer (out, in) lie ``weight`` U8 [out, in/2], two codes a byte, the even column low, and
``weight_scale`` U8 [out, in/32], exponents with a bias of 127: what compressed-tensors has under
other names. Scales are the smallest powers of two that clip nothing (``ceil``), of weights and of
inputs. Read in ModelOpt 0.47.
"""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

from ptq.checkpoint.compressed_tensors_formats import CT_FORMATS

RULE = "ceil"


def readable(path: Path) -> Path:
    """``path`` itself, or if it is MXFP4 of ModelOpt a copy beside it under other names."""
    config = json.loads((path / "config.json").read_text("utf-8"))
    said = config.get("quantization_config", {})
    if (said.get("quant_method"), said.get("quant_algo")) != ("modelopt", "mxfp4"):
        return path
    copy, fmt = path.with_name(f"{path.name}-renamed"), CT_FORMATS["mxfp4"]
    copy.mkdir(exist_ok=True)
    for file in path.glob("*.safetensors"):
        tensors = load_file(file)
        packed = {name for name in tensors if f"{name}_scale" in tensors}
        renamed = {f"{name}_packed" if name in packed else name: t for name, t in tensors.items()}
        save_file(renamed, copy / file.name, metadata={"format": "pt"})
    group = {"targets": ["Linear"], "format": fmt.name, "weights": fmt.weights}
    group["input_activations"] = fmt.weights | {"dynamic": fmt.dynamic}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": fmt.name,
        "config_groups": {"group_0": group},
        "ignore": said["ignore"],
        "ptq": {"input_rule": RULE},
    }
    (copy / "config.json").write_text(json.dumps(config))
    return copy
