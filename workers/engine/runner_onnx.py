"""Run a converted language model with ONNX Runtime: prefill one sequence at a time, decode many in one call.

A slot is the caller's name for a sequence; a row is where its keys and values lie. Decoding wants the rows of its batch next
to each other, so the runner moves rows when a release has left a gap, and not otherwise.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from workers.engine.kv_buffers import DeviceBuffers, HostBuffers, KvBuffers, KvShape, round_capacity
from workers.engine.providers import CPU, CUDA, providers_for
from workers.engine.rows import Rows
from workers.engine.sessions import IDENTITY_GRAPH, open_session

_BINDINGS_KEPT = 64
_log = logging.getLogger(__name__)


class OnnxRunner:
    """Implement `workers.engine.runner.Runner`. Not thread-safe: one engine thread owns it.

    ``context_tokens`` is the caller's wish or the model's limit, whichever is less. Memory on the CPU: about
    ``2 * layers * kv_heads * head_dim * 4`` bytes for each token held (46 KB for SmolLM2-135M), given back by `release`.
    """

    def __init__(
        self, model_dir: Path, *, slots: int, context_tokens: int, providers: Sequence[str], threads: int
    ) -> None:
        """Load the graph. ``threads`` 0 leaves their number to ONNX Runtime. A GPU is used by fp16 models alone.

        I/O: reads the model's files; takes the KV memory of accelerators. Raises: FileNotFoundError, ValueError.
        """
        if slots < 1 or context_tokens < 2:
            raise ValueError(f"a runner needs a slot and two tokens of context; asked for {slots} and {context_tokens}")
        manifest = json.loads((model_dir / "manifest.json").read_text(encoding="utf-8"))
        self.slots = slots
        self.context_tokens = min(context_tokens, int(manifest["context_tokens"]))
        self.vocab_size = int(manifest["vocab_size"])
        usable = providers_for(manifest["precision"], providers)
        if CUDA in providers and CUDA not in usable:
            _log.warning(
                "%s is %s and runs on the CPU; for the GPU run `python -m workers.artifacts ensure --precision fp16`",
                model_dir,
                manifest["precision"],
            )
        self._session = open_session(model_dir / "model.onnx", usable, threads)
        self._kv_names = [i.name for i in self._session.get_inputs() if i.name.startswith("past_")]
        self._kv = self._open_buffers()
        self._rows = Rows(slots)
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._token_ids = np.zeros((slots, 1), np.int64)
        self._seqlens_k = np.zeros(slots, np.int32)
        self._total_tokens = np.zeros(1, np.int32)
        self._logits: NDArray[np.float32] = np.empty((slots, self.vocab_size), np.float32)

    def prefill(self, slot: int, token_ids: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Write the keys and values of positions ``start .. start + n - 1`` of ``slot``.

        Return float32 ``[vocab]``, the logits of the last position: the runner's own buffer, valid until the next call.
        Raises: ValueError for a slot, a start or a length that cannot be.
        """
        count = len(token_ids)
        self._check(slot, start, count)
        row = self._rows.take(slot)
        prompt = np.ascontiguousarray(token_ids, np.int64).reshape(1, count)
        self._seqlens_k[0] = start + count - 1
        self._total_tokens[0] = start + count
        binding = self._binding(row, 1)
        binding.bind_input("input_ids", "cpu", 0, np.int64, [1, count], prompt.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        finally:  # the binding is kept, the prompt is not
            binding.bind_input("input_ids", "cpu", 0, np.int64, [1, 1], self._token_ids.ctypes.data)
        self._rows.set_length(slot, start + count)
        last: NDArray[np.float32] = self._logits[0]
        return last

    def decode(
        self, slots: Sequence[int], token_ids: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Append one token to each of ``slots``, ``token_ids[i]`` at ``positions[i]``, the number of tokens it holds.

        Return float32 ``[n, vocab]``, rows in the order asked, valid until the next call.
        Raises: ValueError for a slot asked for twice, one that holds nothing, or a full one.
        """
        count = len(slots)
        if not count or len(set(slots)) != count:
            raise ValueError(f"decode needs at least one slot and each only once; it got {list(slots)}")
        for slot, position in zip(slots, positions, strict=True):
            self._check(slot, int(position), 1)
            if not position:
                raise ValueError(f"slot {slot} holds no tokens yet; prefill its prompt first")
        first = self._gather(slots)
        order = np.array([self._rows.row(slot) - first for slot in slots])
        self._token_ids[order, 0] = token_ids
        self._seqlens_k[order] = positions
        self._total_tokens[0] = int(positions.max()) + 1
        self._session.run_with_iobinding(self._binding(first, count))
        for slot, position in zip(slots, positions, strict=True):
            self._rows.set_length(slot, int(position) + 1)
        in_order = np.array_equal(order, np.arange(count))
        logits: NDArray[np.float32] = self._logits[:count] if in_order else self._logits[order]
        return logits

    def fork(self, source: int, target: int) -> None:
        """Copy the keys and values of ``source`` to ``target``, which must hold nothing. Raises: ValueError."""
        tokens = self._rows.length(source)
        if not 0 <= target < self.slots or self._rows.length(target) or not tokens:
            raise ValueError(f"slot {source} holds {tokens} tokens and cannot be copied to slot {target}")
        row = self._rows.take(target)
        self._kv.move(self._rows.row(source), row, tokens)
        self._rows.set_length(target, tokens)

    def release(self, slot: int) -> None:
        """Forget a sequence. Releasing an empty slot does nothing."""
        row = self._rows.drop(slot)
        if row is not None:
            self._kv.clear(row)

    def close(self) -> None:
        """Give all memory back. The runner is of no use afterwards."""
        self._bindings.clear()
        self._kv.close()
        del self._session

    def _check(self, slot: int, start: int, count: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"there is no slot {slot}; the runner has {self.slots}")
        if not 0 <= start <= self._rows.length(slot):
            raise ValueError(f"slot {slot} holds {self._rows.length(slot)} tokens; none can be written at {start}")
        if count < 1 or start + count > self.context_tokens:
            raise ValueError(
                f"slot {slot} cannot take {count} tokens at {start}: a sequence is 1 to {self.context_tokens} tokens long"
            )

    def _gather(self, slots: Sequence[int]) -> int:
        """Bring the slots' rows next to each other and return the first row."""
        first, moves = self._rows.gather(slots)
        for source, target, tokens in moves:
            self._kv.move(source, target, tokens)
            self._kv.clear(source)
        return first

    def _binding(self, first: int, count: int) -> ort.IOBinding:
        """Return the binding of ``count`` rows from ``first`` on, for one token each. Kept, since making one costs 120 calls."""
        known = self._bindings.get((first, count))
        if known is not None:
            return known
        if len(self._bindings) >= _BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        binding, kv = self._session.io_binding(), self._kv
        binding.bind_input("input_ids", "cpu", 0, np.int64, [count, 1], self._token_ids.ctypes.data)
        binding.bind_input("seqlens_k", "cpu", 0, np.int32, [count], self._seqlens_k.ctypes.data)
        binding.bind_input("total_sequence_length", "cpu", 0, np.int32, [1], self._total_tokens.ctypes.data)
        shape, dtype = kv.shape.batch(count), kv.shape.dtype.type
        for tensor, name in enumerate(self._kv_names):
            address = kv.address(tensor, first)
            binding.bind_input(name, kv.device, 0, dtype, shape, address)
            binding.bind_output(name.replace("past_", "present_"), kv.device, 0, dtype, shape, address)
        logits_shape = [count, self.vocab_size]
        binding.bind_output("logits", "cpu", 0, np.float32, logits_shape, self._logits.ctypes.data)
        self._bindings[first, count] = binding
        return binding

    def _open_buffers(self) -> KvBuffers:
        cache = next(i for i in self._session.get_inputs() if i.name == self._kv_names[0])
        dtype = np.dtype(np.float16 if cache.type == "tensor(float16)" else np.float32)
        # One row more than slots: the place through which two rows change places.
        shape = KvShape(
            tensors=len(self._kv_names),
            rows=self.slots + 1,
            kv_heads=int(cache.shape[1]),
            capacity=round_capacity(self.context_tokens),
            head_dim=int(cache.shape[3]),
            dtype=dtype,
        )
        if CUDA in self._session.get_providers():
            return DeviceBuffers(shape, "cuda", open_session(IDENTITY_GRAPH, [CUDA, CPU], 1))
        return HostBuffers(shape)
