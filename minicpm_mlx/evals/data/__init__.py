"""Evaluation data: finds, downloads and reads each task's files. `evals` imports this."""
