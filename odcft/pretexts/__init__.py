"""Pretext tasks, which train a checkpoint from random weights if there is none to start from."""
