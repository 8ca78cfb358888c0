"""Run recurrent-depth language models on a laptop, and decide how hard they think."""
