"""A demo that runs offline: drawn scenes with captions, and a small CLIP trained on them."""
