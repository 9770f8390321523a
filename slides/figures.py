"""Figures and sounds of decks 1 and 2. Few inches wide, so that their letters are large on a slide."""
