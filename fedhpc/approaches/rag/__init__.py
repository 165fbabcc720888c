"""Retrieval-augmented generation: the clients' passages are searched where they are."""
