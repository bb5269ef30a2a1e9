"""Quantization: choosing bits for each matrix, rounding, and measuring the loss."""
