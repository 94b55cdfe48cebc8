"""Load a checkpoint as a backbone, a network that turns images into pooled features. Start reading at `load.py`."""
