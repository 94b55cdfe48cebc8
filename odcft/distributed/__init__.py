"""Several processes that train together: starting and stopping them, and what they exchange."""
