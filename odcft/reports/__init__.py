"""What a run learned, for people to look at: contact sheets, clusters as files, near-duplicates."""
