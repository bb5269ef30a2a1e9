"""Reports of a run: scores, tables, charts, comparisons, published scores."""
