"""Pretext tasks: a checkpoint to start from where there is none."""
