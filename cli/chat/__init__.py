"""The terminal chat: `minicpm-mlx chat`."""
