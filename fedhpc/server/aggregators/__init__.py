"""How the updates of a cohort combine into one: one file per aggregator."""
