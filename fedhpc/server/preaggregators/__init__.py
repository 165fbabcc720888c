"""How updates are mixed before an aggregator combines them: one file per way."""
