"""Continuous batching: the scheduler, the batch it steps, prefill, and the prefix cache."""
