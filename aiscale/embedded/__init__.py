"""Run the whole of aiscale on one machine, as child processes of one command.

Owns:        <data_dir>/pg, valkey, run and logs
Enter at:    stack.run_stack (`manage.py up`), servers.start_servers (the tests' own Postgres and Valkey)
May import:  aiscale.env, embedded_urls; Django only through its management commands
Invariant:   one `up` for a data directory; a child that dies is started again; no child outlives `up`
Hot path:    none
If it fails: one line says what is wrong and what to do; logs are in <data_dir>/logs; data stays as it is
"""
