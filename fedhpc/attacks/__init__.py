"""What clients do that attack a federation: one file per attack. Part of an experiment, never of the default."""
