"""Rules that change a client's gradient: one file per rule."""
