"""A finished run as files for others: rebuilt, written, loaded again with Transformers and PEFT
alone, and compared.
"""
