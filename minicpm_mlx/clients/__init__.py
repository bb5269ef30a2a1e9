"""Settings of other programs that use a running server; only the command line imports it."""
