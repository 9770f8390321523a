"""What only measures and compares. No other room imports it."""
