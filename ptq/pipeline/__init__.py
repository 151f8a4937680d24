"""One run, from a model to a checkpoint."""
