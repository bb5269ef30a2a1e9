"""File access: atomic replacement, JSON, JSON Lines, tables and plots. Imports no model."""
