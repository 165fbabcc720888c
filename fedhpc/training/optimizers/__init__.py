"""Rules of the local steps, along the client axis: one file per rule."""
