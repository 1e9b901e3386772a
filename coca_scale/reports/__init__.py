"""What is told about a run and its model: a page of curves, a model card, the files of a hub."""
