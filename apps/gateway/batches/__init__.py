"""Run bulk jobs: files or lists of requests, answered one by one at half price and lowest priority, within a day.

Owns:        tables Batch and BatchLine
Enter at:    answers.answer_creation and messages.answer_creation, and their neighbours; runner.advance and upkeep.list_due, for the tasks
May import:  apps.gateway's endpoints, exchange, files and parameters; apps.inference, apps.accounts, aiscale.errors, db
Invariant:   one process at a time works on a batch, by a lease; each line is answered once and charged once, whatever died in between;
             what a limit refuses for now waits, what it refuses for good is an error of that line alone
Hot path:    none: three SQL statements a line, besides what the request itself costs
If it fails: the lease runs out within seconds and another process goes on with the line that was running
"""
