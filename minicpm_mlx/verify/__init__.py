"""Proves on this machine that the runtime computes right, and measures how fast it does."""
