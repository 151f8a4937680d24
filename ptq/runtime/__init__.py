"""A checkpoint that runs: layers, experts, loading, generation, evaluation."""
