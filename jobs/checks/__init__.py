"""What `clipmill doctor` looks at, one file for each kind of thing."""
