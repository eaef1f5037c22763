"""The benchmark: every figure of the data path, measured on one broker, from one input, in one run."""
