"""Who holds which training example: one file per rule."""
