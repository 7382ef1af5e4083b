"""Runs on record: what each tells of itself, and how it compares with earlier ones."""
