"""Speak Anthropic's Messages API: answer, stream and count tokens.

Owns:        nothing
Enter at:    creation.answer_messages, creation.answer_count
May import:  apps.gateway's exchange, parameters and streaming; apps.inference, apps.accounts, aiscale.errors, wire
Invariant:   every error has Anthropic's shape; an answer that begins with the caller's words goes on from them
Hot path:    as a chat completion
If it fails: before the first token a status; after it an event ``error``, the stream's last
"""
