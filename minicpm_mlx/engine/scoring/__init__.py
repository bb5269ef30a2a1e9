"""Log probabilities of given text: perplexity, and log likelihoods of continuations."""
