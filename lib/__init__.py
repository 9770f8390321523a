"""The package behind the course *Music with state spaces*."""
