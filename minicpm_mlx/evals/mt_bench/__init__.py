"""MT-Bench: questions, answers, a judge, and its chart."""
