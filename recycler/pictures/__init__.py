"""Pictures of a zoo, its routing and its results, a file a picture; `canvas` and `heat` hold what they share.

Each has plain data, `draw` (a matplotlib figure), `table` (the numbers behind it, as CSV), and `describe` (what a person who cannot
see it should hear).
"""
