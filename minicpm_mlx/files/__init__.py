"""Reading and writing files: atomic replacement, JSON, JSON Lines, tables, plots. Imports no model."""
