"""Who answered, and why: in the terminal and on pages."""
