"""What the results are worth."""
