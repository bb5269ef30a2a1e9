"""Training on a laptop: data, adapters, losses, and a loop that can be interrupted."""
