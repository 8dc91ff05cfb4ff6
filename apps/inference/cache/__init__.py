"""Answer again what was answered before: exact answers in three levels, one inference for identical requests in flight, and, for
organizations that wish it, one answer to questions that are alike.

Owns:        tables CachedAnswer, CacheGeneration, SemanticEntry and SemanticAccount; Redis keys cached, flight, flight_wanted,
             flight_log and CACHE_GENERATIONS; this process's own copy (level 1)
Enter at:    policy.choose, store.find_many and keep_many, vectors.find, semantic.look and learn, telling.admit_known,
             generations.purge, flights.claim and join
May import:  apps.accounts, apps.spend, aiscale.redis, db, wire, errors, observability
Invariant:   an answer is found only by the same model version, token ids and sampling, within the same scope and generation; a hit passes
             the gate, is charged at the plan's cached price and is in the ledger like any other answer. Where the last message need
             only be alike, all else is the same too, and the expected rate of wrong answers stays below the organization's bound
Hot path:    one Redis trip for the generation, and one for the gate with the end for settlement; between them none for level 1, one Redis
             trip for level 2, one SQL statement shared by many for level 3. Alike questions: an encoder job and an SQL transaction
If it fails: a cache that does not answer is a miss, and what cannot be kept is dropped; nobody waits for it
"""
