"""Tasks that ask a trained model: needles and other long-context tasks, LongBench, perplexity, lm-eval."""
