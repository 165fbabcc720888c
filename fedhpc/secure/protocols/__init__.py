"""Protocols of secure aggregation: who shares masks with whom, and how many clients can undo one. One file each."""
