"""Processes that work together, are started together and stop together."""
