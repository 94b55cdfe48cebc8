"""Where images are: folders, list files, tar shards, Parquet, Hugging Face datasets; here or behind a URL."""
