"""Composed models on the Hub."""
