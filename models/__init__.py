"""Model cards: one TOML file a checkpoint; data, never weights."""
