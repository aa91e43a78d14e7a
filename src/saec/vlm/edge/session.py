"""Running a decoder graph with a fixed KV cache in ONNX Runtime: one conversation, any number of tokens at a time.

All inputs and outputs of a step lie in numpy arrays that are bound to the graph once; a decode step then costs the
graph, one write into the cache, and some tens of microseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from saec.errors import BadInput
from saec.vlm.contract.signature import Signature
from saec.vlm.edge.kv import Cache, Prefix, States

CHUNK = 128
"""New tokens that a free graph gets at once: their scores against each other grow with the square."""

Array = NDArray[np.float32]


class ContextFull(BadInput):
    """One token more than the model's context holds."""

    def __init__(self, tokens: int, context: int) -> None:
        fix = "ask something shorter, allow fewer tokens, or export the model with a longer cache"
        super().__init__(f"{tokens} tokens do not fit into the model's context of {context}", fix=fix)


class Decoder:
    """A decoder graph that conversations are opened on. One thread at a time: they share its threads and its memory."""

    def __init__(self, file: Path, signature: Signature, *, threads: int) -> None:
        """Load the graph.

        Raises:
            BadInput: not an ONNX model, or one that wants its embeddings or rotations otherwise than this runtime
                hands them in.
        """
        if signature.embeddings != "outside" or signature.rope != "inside":
            what = "the decoder takes token ids or rotations, this runtime hands in embeddings and positions"
            raise BadInput(what, where=file, fix="export it with embeddings outside and rope inside")
        self.signature = signature
        self.graph = open_graph(file, threads=threads)

    def open(self, prefix: Prefix | None = None, length: int | None = None) -> Conversation:
        """Begin a conversation, or continue from a copy of the first ``length`` tokens of a saved one."""
        return Conversation(self, Cache(self.signature, prefix, length))


class Conversation:
    """Tokens fed so far, and the next one's logits after each feed."""

    def __init__(self, decoder: Decoder, cache: Cache) -> None:
        self._decoder = decoder
        self._cache = cache
        self._step: _Step | None = None

    @property
    def length(self) -> int:
        """Tokens fed so far."""
        return self._cache.length

    @property
    def left(self) -> int:
        """Tokens that can still be fed or generated, one at a time."""
        return max(0, self._decoder.signature.cache + 1 - self.length)

    def feed(self, embeds: NDArray[Any]) -> Array:
        """Return the logits [V] float32 after new tokens ``embeds`` [n, H], n any number above 0.

        Raises:
            ContextFull: they do not fit; nothing was fed.
        """
        signature = self._decoder.signature
        size = signature.n or CHUNK
        # The last step's tokens need no place in the cache, but all those before it do.
        last = (len(embeds) - 1) % size + 1
        tokens = self.length + len(embeds)
        if tokens > signature.context or tokens - last > signature.cache:
            raise ContextFull(tokens, signature.context)
        for start in range(0, len(embeds), size):
            logits = self._run(embeds[start : start + size])
        return logits.astype(np.float32)

    def keep(self, length: int | None = None) -> Prefix:
        """Return a read-only copy of the first ``length`` tokens' keys and values, by default of all."""
        return self._cache.prefix(self.length if length is None else length)

    def fork(self, length: int | None = None) -> Conversation:
        """Return another conversation with the same first ``length`` tokens; neither changes the other."""
        return Conversation(self._decoder, self._cache.fork(self.length if length is None else length))

    def _run(self, embeds: NDArray[Any]) -> NDArray[Any]:
        new = len(embeds)
        step = self._step
        if step is None or not step.serves(self._cache, new):
            step = self._step = _Step(self._decoder, self._cache, new)
        logits, keys, values = step.run(embeds, self._cache.length)
        self._cache.append(keys, values)
        return logits


class _Step:
    """The inputs and outputs of a graph for one number of new tokens and one size of the cache, bound to arrays.

    New tokens stand at the end of a fixed graph's rows: the last row is then the last token, whatever is padded.
    """

    def __init__(self, decoder: Decoder, cache: Cache, new: int) -> None:
        signature, shape = decoder.signature, decoder.signature.shape
        self._graph = decoder.graph
        self._bound_to = cache.keys
        self._fixed = signature.n is not None
        n = self._n = signature.n or new
        dtype, layers, heads, width = signature.dtype, shape.layers, shape.kv_heads, shape.head_dim
        self._embeds = np.zeros((1, n, shape.hidden_size), dtype)
        self._mask = np.zeros((1, 1, n, cache.room + n), dtype)
        self._positions = np.zeros((1, n), np.int32)
        self._logits = np.empty((1, 1 if signature.logits == "last" else n, shape.vocab_size), dtype)
        self._keys = np.empty((layers, 1, heads, width, n), dtype)
        self._values = np.empty((layers, 1, heads, n, width), dtype)
        past = _by_layer(cache.keys, cache.values)
        self._binding = self._graph.io_binding()
        for spec, array in zip(signature.inputs, (self._embeds, self._mask, self._positions, *past), strict=True):
            self._binding.bind_input(spec.name, *_memory(array))
        for spec, array in zip(signature.outputs, (self._logits, *_by_layer(self._keys, self._values)), strict=True):
            self._binding.bind_output(spec.name, *_memory(array))

    def serves(self, cache: Cache, new: int) -> bool:
        """Whether this step can take ``new`` tokens on top of the cache as it is now."""
        return cache.keys is self._bound_to and (self._fixed or new == self._n)

    def run(self, embeds: NDArray[Any], cached: int) -> tuple[NDArray[Any], States, States]:
        """Return logits [V] of the last token, and keys and values of the new tokens; the next run overwrites them."""
        new = len(embeds)
        pad = self._n - new
        self._embeds[0, pad:] = embeds
        place_tokens(self._mask, self._positions, cached, new)
        self._graph.run_with_iobinding(self._binding)
        return self._logits[0, -1], self._keys[..., pad:], self._values[..., pad:, :]


def place_tokens(mask: NDArray[Any], positions: NDArray[np.int32], cached: int, new: int) -> None:
    """Fill in the inputs of a step: ``new`` tokens stand at the end of ``positions`` [1, n], and in ``mask``
    [1, 1, n, room + n] see the first ``cached`` places of the cache, those before them, and themselves."""
    n = positions.shape[1]
    pad, room = n - new, mask.shape[3] - n
    positions[0, pad:] = np.arange(cached, cached + new)
    mask[:] = 0
    mask[0, 0, pad:, :cached] = 1
    mask[0, 0, pad:, room + pad :] = np.tri(new)


def open_graph(file: Path, *, threads: int) -> ort.InferenceSession:
    """Open an ONNX file, its weights inside or beside it, on the CPU.

    Raises:
        BadInput: it is not there, or not a usable ONNX model.
    """
    if not file.is_file():
        raise BadInput("the model was exported without this part", where=file, fix="export it with all parts")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Planning which of two thousand values share a buffer takes a second of every start; the arena reuses them anyway.
    options.enable_mem_reuse = False
    # A step is hundreds of short operators: waking a sleeping thread for each costs up to a quarter of its time on free
    # cores, and threads that spin as long as they like cost half of it where others want the cores. 10 us is neither.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", "10")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - ONNX Runtime raises half a dozen unrelated classes for a bad file
        what = " ".join(str(error).split())[:200]
        raise BadInput(f"not a usable ONNX model ({what})", where=file, fix="export the model again") from None


def _by_layer(keys: States, values: States) -> list[States]:
    """Return views in the order of the signature: key and value of the first layer, of the second, and so on."""
    return [array for pair in zip(keys, values, strict=True) for array in pair]


def _memory(array: NDArray[Any]) -> tuple[str, int, Any, tuple[int, ...], int]:
    return "cpu", 0, array.dtype.type, array.shape, array.ctypes.data
