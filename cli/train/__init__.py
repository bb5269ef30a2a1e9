"""The training commands: `minicpm-mlx lora` and `dpo`."""
