"""Documents to windows of tokens, for calibration and for evaluation."""
