"""Several processes that work together: collectives, and the launcher that starts them."""
