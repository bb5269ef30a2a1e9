"""lm-evaluation-harness on our models. The command line imports this."""
