"""Writing a model in another form: checkpoints, merged and exported adapters."""
