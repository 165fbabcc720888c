"""What a run is measured by: one file per metric."""
