"""What lies on disk: the schema of a quantized checkpoint. This docstring is the specification.

A checkpoint is a Hugging Face model directory: ``config.json`` with a ``quantization_config``,
safetensors files named ``model.safetensors`` or ``model-00001-of-000NN.safetensors`` with
``model.safetensors.index.json``, tokenizer files, a model card, ``ptq_report.json``: reports of all
layers, and ``SHA256SUMS``: sums of all these files, as ``sha256sum -c`` reads them. Equal runs give
equal bytes, but for times in the report and its sum.

A quantized linear layer (out, in) with groups of g inputs has these tensors under its name:

    tensor               on disk                              in memory (QuantLinear)
    weight_packed        U8 [out, in/2]; U8 [out, in] for     the same
                         elements of 6 or 8 bits
    weight_scale         E4M3: F8_E4M3 [out, in/g]            uint8 bits
                         E8M0: U8 [out, in/g], 2^(byte-127)   the same
                         bfloat16: BF16 [out, in/g]           int16 bits
    weight_global_scale  F32 [1], divides                     float32 scalar, multiplies
    input_global_scale   F32 [1], divides                     float32 scalar, multiplies
    bias                 as in the source                     the same

- The even column of a pair is the low nibble. E2M1 codes are 0bSEEM, INT4 codes two's complement;
  code 0 is zero.
- Scales are never zero or NaN, and have no sign. What a reader refuses:
  :mod:`ptq.checkpoint.layer_checks`.
- ``weight = element[code] * weight_scale / weight_global_scale``: a divisor, as compressed-tensors
  has it. In memory everything multiplies: global scales are made so that 1/(1/t) == t, hence memory
  → disk → memory is bit-exact.
- ``weight_global_scale`` is absent for bfloat16 scales, and for E8M0 scales with a global scale of
  1, ``input_global_scale`` unless inputs are quantized with a calibrated range.
- A rotated weight W R is stored in the rotated basis, and config.json says by which block size.
- Layers that an engine fuses (q/k/v, gate/up) share their global scales if the pipeline quantized
  them together.
- All other tensors are those of the source, under their names. Experts have one set of tensors
  each, under ``….experts.{e}.…``.

This is how the ``ptq`` dialect stores layers. ``quantization_config`` is in one of the dialects of
:mod:`ptq.checkpoint.dialects`; what a dialect stores otherwise is said in its own file. While a
checkpoint is being written it lies in ``<name>.partial`` and is no model yet
(:mod:`ptq.checkpoint.writer`).
"""
