"""Writing captions."""
