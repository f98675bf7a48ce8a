"""What is wrong, and on which machine."""
