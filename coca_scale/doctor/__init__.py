"""What of a machine works for training, what does not, and the fix."""
