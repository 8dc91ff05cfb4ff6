"""Know the models, and run a request from its first check to its last event.

Owns:        tables Model, ModelVersion, Upstream and ModerationFlag; Redis keys traffic, job record, job log, leases, queue,
             lanes and replies (all through the scripts of aiscale.wire)
Enter at:    completions.start, embeddings.embed, moderation.moderate, replies.follow, queue.cancel, catalog.get_model,
             reaper.run, stopping.run, presence.list_workers, traffic.set_weight, traffic.watch
May import:  apps.spend, apps.accounts, aiscale.redis, db, wire, env, errors, observability
Invariant:   a job is admitted before it is queued, and no organization keeps another waiting; whoever
             waits for a job meets exactly one end, by its deadline at the latest
Hot path:    completions: three Redis trips (key, gate, queue with its ticket) and no SQL once the catalog and the plan are warm; for
             what may be cached see apps.inference.cache
If it fails: no Redis: 503 before anything is spent. A worker that dies: another try before the first token, a clear error after it
"""
