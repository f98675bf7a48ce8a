"""The zoo as a set."""
