"""TensorRT plans: what they are, how they are compiled, what the compiler made of a graph."""
