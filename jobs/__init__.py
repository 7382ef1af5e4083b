"""What a person or a scheduler runs: the command line, one module per command."""
