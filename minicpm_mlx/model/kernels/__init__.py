"""Fast replacements of single operations, each with its plain MLX reference."""
