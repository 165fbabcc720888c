"""Ways to customize: one file per method, named as in the configuration."""
