"""Images and their codes: sources, image sets, code shards, the resumable loader. No models."""
