"""From what a recipe names to batches, in an order that no rank or worker decides.

A lane is an endless, deterministic stream of samples. A recipe fixes the number of lanes; shards
are dealt to lanes by seed and epoch, every step takes equally many samples from each, and a rank
reads a consecutive range of them. So the samples of a step are the same on any number of ranks and
workers, and where a run is in its data is a few numbers per lane (`sample.Position`).
"""
