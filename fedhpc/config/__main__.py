"""`python -m fedhpc.config`: every key of the configuration, its default and what it means."""

from __future__ import annotations

from fedhpc.config.reference import reference

if __name__ == "__main__":
    print(reference())
