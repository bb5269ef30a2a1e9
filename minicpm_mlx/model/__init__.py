"""The model: configuration, layers, packed weights and adapters.

It reads no file and knows no engine; `weights`, `engine` and all above them import it.
"""
