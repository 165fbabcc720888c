"""The command `fedhpc export`: what a run trained, in the forms that others take; docs/export.md says which."""
