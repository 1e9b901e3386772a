"""OpenCLIP's format: the only room that knows its names."""
