"""What `clipmill bench` measures, a file for each."""
