"""What is done to updates between client and server: one file per transform."""
