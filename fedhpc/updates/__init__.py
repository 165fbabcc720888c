"""What clients send: layouts of named tensors, exact sums over ranks, and transforms on the way."""
