"""Answer again what was answered before: exact answers in three levels, and one inference for identical requests in flight.

Owns:        tables CachedAnswer and CacheGeneration; Redis keys cached, flight and CACHE_GENERATIONS; this process's own copy (level 1)
Enter at:    policy.choose, store.find_many and keep_many, vectors.find, telling.admit_known, generations.purge, flights.claim
May import:  apps.accounts, apps.spend, aiscale.redis, db, wire, errors, observability
Invariant:   an answer is found only by the same model version, token ids and sampling, within the same scope and generation; a hit passes
             the gate, is charged at the plan's cached price and is in the ledger like any other answer
Hot path:    one Redis trip for the generation, and one for the gate with the end for settlement; between them none for level 1, one Redis
             trip for level 2, one SQL statement shared by many for level 3
If it fails: a cache that does not answer is a miss, and what cannot be kept is dropped; nobody waits for it
"""
