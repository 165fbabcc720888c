"""The processes of a run: how they are launched, where they work, how they talk, and how they end."""
