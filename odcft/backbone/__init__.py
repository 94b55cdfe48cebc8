"""From a checkpoint or a name to a network that turns images into pooled features; `load.py` is the door."""
