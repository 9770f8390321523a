"""The decks of the course: Markdown sources, and what makes them pages that need no network."""
