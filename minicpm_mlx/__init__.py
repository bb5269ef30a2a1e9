"""MiniCPM 1.0 on Apple silicon, with MLX."""
