"""Device models: how long a client takes in virtual time. One file per model."""
