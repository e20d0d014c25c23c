"""Task families, one a file: what a model is asked, how its answer is read, and how answers are
scored.
"""
