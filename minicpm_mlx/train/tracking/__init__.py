"""What a run reports: events, the JSONL log, trackers, the loss curve."""
