"""From GPUs and hours to a model and its tokens, and back: scaling laws, price and memory."""
