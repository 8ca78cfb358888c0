"""Export: checkpoints become quantised model files, with the numbers to prove it."""
