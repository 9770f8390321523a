"""What keeps the README, the notebooks and a workshop's bundle in step."""
