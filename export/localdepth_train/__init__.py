"""Training: checkpoint reader, reference model (the definition of correct), tasks, trainer."""
