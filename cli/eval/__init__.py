"""The evaluation commands: `minicpm-mlx eval` and `ppl`."""
