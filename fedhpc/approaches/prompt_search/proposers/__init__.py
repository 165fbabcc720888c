"""Where new candidate prompts come from, one file each (method.proposers)."""
