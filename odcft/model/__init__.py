"""What is trained: backbone, neck and head, of one network or several; what they see, and what they learn."""
