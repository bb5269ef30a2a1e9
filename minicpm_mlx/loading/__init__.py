"""From the name of a model to a model in memory: download, conversion, loading."""
