"""A Hugging Face model, from disk or from memory, a block at a time."""
