"""Files on disk: atomic writes, JSON, JSON Lines, tables and plots. Any package may import it; it imports `errors` and `arguments` alone."""
