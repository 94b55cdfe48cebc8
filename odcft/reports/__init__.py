"""What people look at: the report of a run, its clusters as pictures and lists, and the comparison of two runs."""
