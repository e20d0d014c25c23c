"""What follows from an architecture alone: parameters, operations, bytes."""
