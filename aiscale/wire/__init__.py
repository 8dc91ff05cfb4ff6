"""Hold the contract between the web and the workers: plain Python, versioned, no Django.

Owns:        the shape of jobs and events, and the names and lives of all Redis keys
Enter at:    jobs, events, codec, keys, broker, scripts, manifest
May import:  msgspec and the standard library; aiscale.env, aiscale.errors
Invariant:   a message is read only by code that knows its version; each job has exactly one `Finished`
Hot path:    no I/O in here; the Lua scripts cost one Redis trip each
If it fails: a message that cannot be read is refused by name and logged; the job's lease or deadline ends it
"""
