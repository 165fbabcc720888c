"""How the server steps along the aggregated pseudo-gradient: one file per optimizer."""
