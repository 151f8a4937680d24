"""Formats, scales, rotations and the algorithms that round weights: pure functions on tensors, no
I/O, nothing else of ptq."""
