"""Schedules: which clients start when, and from which version of the server's state. One file per schedule."""
