"""Makes FP8 towers of float32 ones: scales, rounding, what stays in 16 bit, the audit of it."""
