"""Images: where they are, how they are decoded, cropped, augmented and batched."""
