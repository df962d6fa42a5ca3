"""What the commands do, for a person at a terminal. Heavy imports stay inside functions: a page must open at once."""
