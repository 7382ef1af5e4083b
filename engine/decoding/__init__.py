"""Decoding on the card: which images it may decode, and how."""
