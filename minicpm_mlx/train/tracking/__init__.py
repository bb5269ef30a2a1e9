"""Reports of a run: events, the JSONL log, trackers, the loss curve."""
