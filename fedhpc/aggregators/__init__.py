"""How the updates of a cohort combine: one file per rule."""
