"""Commands that fetch, list, convert and quantize models."""
