"""The outside world: tokenizers, checkpoints, records, metrics, the run directory."""
