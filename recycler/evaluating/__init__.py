"""Is routing worth it, and which?"""
