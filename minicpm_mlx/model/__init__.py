"""The model itself: configuration, layers, packed weights, adapters. Imports no file reader and no engine."""
