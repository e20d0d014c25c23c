"""Running text for pretraining: sources, token shards, windows of them, and the order in which
they are learned from.
"""
