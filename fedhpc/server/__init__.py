"""The server: its state, how updates combine, and how the state steps."""
