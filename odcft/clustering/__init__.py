"""The memories, K-Means and the methods: how images get their labels."""
