"""Differential privacy: what a run promises about its clients or their examples. One file per level of protection."""
