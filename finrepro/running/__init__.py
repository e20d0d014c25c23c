"""The walk of one cell, and the processes that walk it."""
