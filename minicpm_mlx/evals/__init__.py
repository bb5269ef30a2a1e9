"""Evaluation of models: MiniCPM's published table, MT-Bench, lm-evaluation-harness.

The command line imports this.
"""
