"""This application's routes."""
