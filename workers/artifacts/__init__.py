"""Fetch model weights, check them to the byte, and convert them into ONNX graphs on disk.

Owns:        the models directory, `<models_dir>/<name>/<version>/` and all below it
Enter at:    `python -m workers.artifacts`, build.ensure, build.verify, imports.import_model
May import:  aiscale.wire, aiscale.env, workers.engine; onnx, onnxruntime, gguf, safetensors, tokenizers, numpy
Invariant:   sources are data: nothing of them is run, and no pickle is opened; a directory with a manifest holds a complete model;
             equal versions, equal sources and converter
Hot path:    none; a start with all models in place costs a few stats
If it fails: one line says what failed and what to do; a crash leaves no half model, and what was there keeps working
"""
