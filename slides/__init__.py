"""The decks of the course: Markdown sources, and what turns them into pages that need
no network.
"""
