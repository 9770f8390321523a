"""Is what was played any good, and is it copied?"""
