"""Compute many sequences at once on one model: pure, without broker or network.

Owns:        the model's session, its KV cache and the threads that use them
Enter at:    engine.Engine.submit, engine.Engine.abort, encoding.EncoderThread.submit
May import:  numpy, tokenizers, llguidance in grammar alone; onnxruntime in runner_onnx, encoder, sessions, kv_buffers and providers alone
Invariant:   every submitted sequence gets exactly one end; a slot is held by at most one sequence
Hot path:    one call for prompts' chunks and one that decodes, for each step
If it fails: a sequence that cannot be computed ends alone; a runner that fails ends all that run, by name
"""
