"""Arithmetic about runs that need not exist."""
