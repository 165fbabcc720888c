"""Rules of the server step: one file per rule."""
