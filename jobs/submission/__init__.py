"""A command as a job on a Ray cluster: packed, named, submitted, followed and found again."""
