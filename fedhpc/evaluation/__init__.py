"""How good a payload is: losses, labels and generated texts, and the metrics made of them."""
