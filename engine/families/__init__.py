"""Model families: one file builds the towers of one kind of checkpoint."""
