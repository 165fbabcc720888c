"""Averaging of parameters."""
