"""Dataset formats, one a file: each turns the bytes of its files into splits of examples."""
