"""Run a converted language model with ONNX Runtime: chunks of many sequences in one call, however long each.

A slot is the caller's name for a sequence; a row is where its keys and values lie. A call takes a run of neighbouring rows; those
between that it has no work for stay idle, and rows are moved together only when too many would.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from workers.engine.batches import Batch, lay_out
from workers.engine.kv_buffers import DeviceBuffers, HostBuffers, KvBuffers, KvShape, round_capacity
from workers.engine.providers import CPU, CUDA, providers_for
from workers.engine.rows import Rows
from workers.engine.runner import Chunk
from workers.engine.sessions import IDENTITY_GRAPH, PICK_GRAPH, open_session, refuse_overflow

_BINDINGS_KEPT = 64
_IDLE_SHARE = 4
"""Rows are moved together only when more than one in so many of a call's rows would be idle: moving copies their keys and values."""
_log = logging.getLogger(__name__)


class OnnxRunner:
    """Implement `workers.engine.runner.Runner`. Not thread-safe: one engine thread owns it.

    ``context_tokens`` is the caller's wish or the model's limit, whichever is less. Memory on the CPU: about
    ``2 * layers * kv_heads * head_dim * 4`` bytes for each token held (46 KB for SmolLM2-135M), given back by `release` and `drop`.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        slots: int,
        context_tokens: int,
        providers: Sequence[str],
        threads: int,
        kept_places: int = 0,
    ) -> None:
        """Load the graph. ``threads`` 0 leaves their number to ONNX Runtime. A GPU is used by fp16 models alone.

        I/O: reads the model's files; takes the KV memory of accelerators. Raises: FileNotFoundError, ValueError.
        """
        if slots < 1 or context_tokens < 2:
            raise ValueError(f"a runner needs a slot and two tokens of context; asked for {slots} and {context_tokens}")
        manifest = json.loads((model_dir / "manifest.json").read_text(encoding="utf-8"))
        refuse_overflow(model_dir, manifest)
        self.slots, self.kept_places = slots, kept_places
        self._positions = int(manifest["context_tokens"])
        self.context_tokens = min(context_tokens, self._positions)
        self.vocab_size = int(manifest["vocab_size"])
        usable = providers_for(manifest["precision"], providers)
        if CUDA in providers and CUDA not in usable:
            _log.warning(
                "%s is %s and runs on the CPU; for the GPU run `python -m workers.artifacts ensure --precision fp16`",
                model_dir,
                manifest["precision"],
            )
        self._session = open_session(model_dir / "model.onnx", usable, threads)
        if CUDA in usable and CUDA not in self._session.get_providers():
            _log.warning(
                "the GPU could not be opened, and %s runs on the CPU: look at its driver and libraries", model_dir
            )
        self._kv_names = [i.name for i in self._session.get_inputs() if i.name.startswith("past_")]
        self._kv = self._open_buffers()
        on_device = isinstance(self._kv, DeviceBuffers)
        self._picker = open_session(PICK_GRAPH, [CUDA, CPU], 1) if on_device else None
        self._logits_there: ort.OrtValue | None = None
        self._rows = Rows(slots)
        self._bindings: dict[tuple[int, int], ort.IOBinding] = {}
        self._logits: NDArray[np.float32] = np.empty((slots, self.vocab_size), np.float32)

    def compute(self, chunks: Sequence[Chunk], *, every: bool = False) -> NDArray[np.float32]:
        """See `Runner.compute`. Raises: ValueError for a slot asked for twice, a start or a length that cannot be."""
        self._check_all(chunks)
        longest = max(len(chunk.token_ids) for chunk in chunks)
        if len(chunks) > 1 and any(chunk.start + longest > self._room for chunk in chunks):
            # padded to the longest, one of them would reach past its row
            return np.concatenate([self.compute([chunk], every=every).copy() for chunk in chunks])
        window, batch = self._lay_out(chunks, longest, every=every)
        logits = self._run(window, batch)
        for chunk in chunks:
            self._rows.set_length(chunk.slot, chunk.start + len(chunk.token_ids))
        return logits

    def pick(self, chunks: Sequence[Chunk]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """See `Runner.pick`. On an accelerator the logits stay there. Raises: as `compute`."""
        if self._picker is None or any(len(chunk.token_ids) > 1 for chunk in chunks):
            logits = self.compute(chunks)
            return logits.argmax(axis=1), logits.max(axis=1)
        self._check_all(chunks)
        window, batch = self._lay_out(chunks, 1, every=False)
        address = self._run_there(window, batch)
        count = len(chunks)
        tokens, peaks = np.empty(count, np.int64), np.empty(count, np.float32)
        binding = self._picker.io_binding()
        binding.bind_input("logits", self._kv.device, 0, np.float32, [count, self.vocab_size], address)
        binding.bind_output("tokens", "cpu", 0, np.int64, [count], tokens.ctypes.data)
        binding.bind_output("peaks", "cpu", 0, np.float32, [count], peaks.ctypes.data)
        self._picker.run_with_iobinding(binding)
        for chunk in chunks:
            self._rows.set_length(chunk.slot, chunk.start + 1)
        return tokens, peaks

    def _lay_out(self, chunks: Sequence[Chunk], longest: int, *, every: bool) -> tuple[range, Batch]:
        window = self._gather([chunk.slot for chunk in chunks], longest)
        batch = lay_out(
            chunks, [self._rows.row(chunk.slot) - window.start for chunk in chunks], len(window), every=every
        )
        for row in window:
            if not batch.query_seqlens[row - window.start]:  # somebody else's, or nobody's: nothing is written
                batch.seqlens_k[row - window.start] = max(self._rows.length_of_row(row) - 1, 0)
        return window, batch

    @property
    def picks(self) -> bool:
        return self._picker is not None

    def prefill(self, slot: int, token_ids: Sequence[int] | NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Append one chunk; return its last position's logits, ``[vocab]``. As `compute`."""
        logits: NDArray[np.float32] = self.compute([Chunk(slot, [int(t) for t in token_ids], start)])[0]
        return logits

    def decode(
        self, slots: Sequence[int], token_ids: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Append one token to each of ``slots``; return ``[n, vocab]``. As `compute`."""
        return self.compute([Chunk(s, [int(t)], int(p)) for s, t, p in zip(slots, token_ids, positions, strict=True)])

    def fork(self, source: int, target: int) -> None:
        """Copy the keys and values of ``source`` to ``target``, which must hold nothing. Raises: ValueError."""
        tokens = self._rows.length(source)
        row = self._take_empty(target, tokens)
        self._kv.move(self._rows.row(source), row, tokens)
        self._rows.set_length(target, tokens)

    def keep(self, slot: int, place: int, start: int, end: int) -> None:
        if not 0 <= place < self.kept_places or not 0 <= start < end <= self._rows.length(slot):
            raise ValueError(f"slot {slot} cannot be kept from {start} to {end} in place {place}")
        self._kv.move(self._rows.row(slot), self._kept_row(place), end, start)

    def restore(self, place: int, slot: int, tokens: int) -> None:
        row = self._take_empty(slot, tokens)
        self._kv.move(self._kept_row(place), row, tokens)
        self._rows.set_length(slot, tokens)

    def drop(self, place: int) -> None:
        self._kv.clear(self._kept_row(place))

    def release(self, slot: int) -> None:
        """Forget a sequence. Releasing an empty slot does nothing."""
        row = self._rows.drop(slot)
        if row is not None:
            self._kv.clear(row)

    def close(self) -> None:
        """Give all memory back. The runner is of no use afterwards."""
        self._bindings.clear()
        self._kv.close()
        self._logits_there = self._picker = None
        del self._session

    @property
    def _room(self) -> int:
        """The last position, padding included, that a call may reach: the end of a row, or of the rotation's table."""
        return min(self._kv.shape.capacity, self._positions)

    def _kept_row(self, place: int) -> int:
        return self.slots + 1 + place

    def _take_empty(self, slot: int, tokens: int) -> int:
        if not 0 <= slot < self.slots or self._rows.length(slot) or not tokens:
            raise ValueError(f"slot {slot} holds {self._rows.length(slot)} tokens and cannot be given {tokens}")
        return self._rows.take(slot)

    def _check_all(self, chunks: Sequence[Chunk]) -> None:
        if not chunks or len({chunk.slot for chunk in chunks}) != len(chunks):
            raise ValueError(f"a call needs at least one slot and each only once; it got {[c.slot for c in chunks]}")
        for chunk in chunks:
            self._check(chunk.slot, chunk.start, len(chunk.token_ids))
            self._rows.take(chunk.slot)

    def _check(self, slot: int, start: int, count: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"there is no slot {slot}; the runner has {self.slots}")
        if not 0 <= start <= self._rows.length(slot):
            raise ValueError(f"slot {slot} holds {self._rows.length(slot)} tokens; none can be written at {start}")
        if count < 1 or start + count > self.context_tokens:
            raise ValueError(
                f"slot {slot} cannot take {count} tokens at {start}: a sequence is 1 to {self.context_tokens} tokens long"
            )

    def _gather(self, slots: Sequence[int], longest: int) -> range:
        """Return the run of rows to compute, which holds those of ``slots`` and perhaps a few that stay idle."""
        window = self._rows.window(slots)
        idle = [row for row in window if self._rows.length_of_row(row)]
        if len(window) <= len(slots) + len(slots) // _IDLE_SHARE and all(
            self._rows.length_of_row(row) + longest <= self._room for row in idle
        ):
            return window
        first, moves = self._rows.gather(slots)
        for source, target, tokens in moves:
            self._kv.move(source, target, tokens)
            self._kv.clear(source)
        return range(first, first + len(slots))

    def _run(self, window: range, batch: Batch) -> NDArray[np.float32]:
        wanted = len(batch.wanted)
        if wanted > len(self._logits):
            self._logits = np.empty((wanted, self.vocab_size), np.float32)
        self._bind_and_run(window, batch, "cpu", self._logits.ctypes.data)
        logits: NDArray[np.float32] = self._logits[:wanted]
        return logits

    def _run_there(self, window: range, batch: Batch) -> int:
        """Leave the logits where they are made; return their address, ``[n, vocab]``, valid until the next call."""
        if self._logits_there is None:
            shape = [self.slots, self.vocab_size]
            self._logits_there = ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, self._kv.device, 0)
        address = int(self._logits_there.data_ptr())
        self._bind_and_run(window, batch, self._kv.device, address)
        return address

    def _bind_and_run(self, window: range, batch: Batch, device: str, address: int) -> None:
        binding = self._binding(window.start, len(window))
        inputs = batch.inputs()
        for name, value in inputs.items():
            binding.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
        binding.bind_output("logits", device, 0, np.float32, [len(batch.wanted), self.vocab_size], address)
        self._session.run_with_iobinding(binding)

    def _binding(self, first: int, count: int) -> ort.IOBinding:
        """Return a binding of ``count`` rows from ``first`` on. Kept, since making one costs 120 calls."""
        known = self._bindings.get((first, count))
        if known is not None:
            return known
        if len(self._bindings) >= _BINDINGS_KEPT:
            self._bindings.pop(next(iter(self._bindings)))
        binding, kv = self._session.io_binding(), self._kv
        shape, dtype = kv.shape.batch(count), kv.shape.dtype.type
        for tensor, name in enumerate(self._kv_names):
            address = kv.address(tensor, first)
            binding.bind_input(name, kv.device, 0, dtype, shape, address)
            binding.bind_output(name.replace("past_", "present_"), kv.device, 0, dtype, shape, address)
        self._bindings[first, count] = binding
        return binding

    def _open_buffers(self) -> KvBuffers:
        cache = next(i for i in self._session.get_inputs() if i.name == self._kv_names[0])
        dtype = np.dtype(np.float16 if cache.type == "tensor(float16)" else np.float32)
        # slots; the place through which two rows change places; then what is kept aside
        shape = KvShape(
            tensors=len(self._kv_names),
            rows=self.slots + 1 + self.kept_places,
            kv_heads=int(cache.shape[1]),
            capacity=round_capacity(self.context_tokens),
            head_dim=int(cache.shape[3]),
            dtype=dtype,
        )
        if CUDA in self._session.get_providers():
            return DeviceBuffers(shape, "cuda", open_session(IDENTITY_GRAPH, [CUDA, CPU], 1))
        return HostBuffers(shape)
