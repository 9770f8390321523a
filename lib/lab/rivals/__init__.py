"""Other architectures of equal size."""
