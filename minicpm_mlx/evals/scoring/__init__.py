"""Scores answers: parsing, metrics, normal forms of formulas, early stopping."""
