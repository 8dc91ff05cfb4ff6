"""Run models: called by Celery's tickets, take jobs from the queue, compute them in continuous batches, and say what came out.

Owns:        converted models on disk; Redis keys worker presence and job result
Enter at:    workers.celery.app (tasks aiscale.generate and aiscale.encode), python -m workers.artifacts
May import:  aiscale.wire, env, errors, observability; never Django, never the database, never money
Invariant:   a job that this worker claimed ends in exactly one Finished, or its lease passes and the reaper ends it
Hot path:    one Redis pipeline for each engine step, whatever the batch
If it fails: leases pass within six seconds; jobs without text come back to their place, others end with a clear error
"""
