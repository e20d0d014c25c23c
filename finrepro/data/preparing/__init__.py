"""From text to shards of tokens."""
