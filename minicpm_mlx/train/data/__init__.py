"""Training data: files to rows, rows to messages, messages to token ids and batches."""
