"""Measured speed, counted work, and what they let one expect of other machines."""
