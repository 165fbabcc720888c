"""What the approaches share whose clients only score candidates."""
