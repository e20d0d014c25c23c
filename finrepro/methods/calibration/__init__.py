"""The search of ICQ's tau: how good each candidate of a block is, and what has been searched
before.
"""
