"""Scoring answers: parsing, metrics, equality of formulas, early stopping."""
