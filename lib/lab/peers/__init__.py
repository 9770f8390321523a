"""Other people's implementations, as second opinions."""
