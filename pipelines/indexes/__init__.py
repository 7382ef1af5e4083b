"""Indexes of a snapshot's embeddings: what they hold, how they are built, opened and kept up."""
