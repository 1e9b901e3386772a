"""What a run folder holds, by name: training writes it, reports and other programs read it."""

RECIPE = "recipe.yaml"  # resolved
VERSIONS = "versions.json"  # of packages, the commit, the number of ranks
METRICS = "metrics.jsonl"  # an object per logged step
EVENTS = "events.jsonl"  # an object per start, save, failure and end
VALIDATION = "validation.jsonl"  # an object per validation
SHEETS = "validation"  # pictures with captions
BAD_SAMPLES = "bad_samples.jsonl"
BAD_STEPS = "bad_steps.jsonl"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
LATEST = "latest"  # in it: name of the newest one
LOCAL_ID = "local_id"  # in it: of this run's saves on the nodes
EXPORT = "export"  # model folder of the end of the run
PROFILE = "profile"
LOCK = "lock"  # who trains into the folder
STACKS = "stacks"  # of every rank, where a run hung
