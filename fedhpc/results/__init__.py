"""What a run leaves behind: the run directory, results.h5, the checkpoint, the screen."""
