"""A run's directory, and what is in it."""
