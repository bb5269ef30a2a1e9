"""Runs programs that a model wrote, in processes that can do no harm. `evals.run` imports this."""
