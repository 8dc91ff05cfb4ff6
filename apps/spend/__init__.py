"""Decide whether a caller may spend this much now, and record what it cost: the only code that moves money.

Owns:        tables UsageRecord, LedgerTransaction, LedgerEntry, Correction, Price, Rerating, KillSwitch, Budget, SpendTotal,
             SpendAlert, AlertDelivery, WebhookEndpoint, RefusedRequest and RefusalCount; Redis keys BUDGETS, REFUSED, spend, holds, rate,
             token_rate, KILLED, FINISHED_DEAD, EPOCH, RECOVERING and SETTLEMENT_PRESENCE
Enter at:    admission.admit, admission.release, pricing.cost_nanousd, killswitch.trip, release and restore, settlement.run,
             usage.month_summary, corrections.give_credit, adjust and refund, prices.map_current and change, rerating.order,
             statements.build, alerts.deliver_due, endpoints.add, rotate and delete, explanations.explain, refusal_log.note,
             refusal_writer.run
May import:  apps.accounts, aiscale.redis, db, wire, errors, observability
Invariant:   spent + held of no budget passes its limit at admission; each job is charged once; the ledger's sums are zero and its
             rows are never changed; a refusal leaves every counter as it was
Hot path:    admission: one Redis trip, no SQL. Settlement, in its own process: seven statements for up to 500 jobs
If it fails: no Redis, or one that was emptied: 503 and nothing is spent, until what ended is settled. No Postgres: finished jobs
             wait in their stream until it is back. A hold whose job was lost expires by itself
"""
