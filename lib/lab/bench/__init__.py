"""Times and sizes, ours and other people's."""
