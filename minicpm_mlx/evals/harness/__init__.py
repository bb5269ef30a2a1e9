"""lm-evaluation-harness on this runtime."""
