"""Black-box prompt tuning (FedBPT)."""
