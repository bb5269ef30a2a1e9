"""MT-Bench: questions, answers, judge and chart. The command line imports this."""
