"""Local training of the clients."""
