"""The stages of training. Each is an entry script and is imported from its own module."""
