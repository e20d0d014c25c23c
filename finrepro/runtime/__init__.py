"""The process that computes: seeds, ranks, memory, interrupts."""
