"""Benchmarks: measured speed, counted kernels, predictions for other machines.

The command line and benchmarks/ import this.
"""
