"""Secure aggregation: clients mask their uploads, so that the server learns the sum of them and no single one."""
