"""Adapters, one method a file: which parameters are trained, and what is exported."""
