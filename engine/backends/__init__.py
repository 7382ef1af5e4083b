"""What executes a tower: one module per runtime, one protocol for all."""
