"""Share converted models between tests, and the smallest llama there is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from workers.artifacts import build


@pytest.fixture(scope="session")
def smollm2_dir(models_dir: Path) -> Path:
    [manifest] = build.ensure(models_dir, ["smollm2-135m-instruct"])
    return models_dir / manifest.name / manifest.version


@pytest.fixture(scope="session")
def smollm2_fp32_dir(models_dir: Path) -> Path:
    [manifest] = build.ensure(models_dir, ["smollm2-135m-instruct"], "fp32")
    return models_dir / manifest.name / manifest.version


@pytest.fixture(scope="session")
def minilm_dir(models_dir: Path) -> Path:
    [manifest] = build.ensure(models_dir, ["all-minilm-l6-v2"])
    return models_dir / manifest.name / manifest.version


@dataclass(frozen=True)
class TinyLlama:
    """Hold a random llama's weights as a paper would write them (no GGUF row order), and compute it in float64."""

    layers: int = 3
    hidden: int = 64
    ffn: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    context_tokens: int = 160
    rope_base: float = 10_000.0
    epsilon: float = 1e-5
    tied: bool = False

    @property
    def words(self) -> list[str]:
        letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
        return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "Ċ", *letters, "he", "hel", "Ġt", *"0123456789"]

    def weights(self, seed: int = 7) -> dict[str, NDArray[np.float32]]:
        rng = np.random.default_rng(seed)

        def matrix(rows: int, columns: int) -> NDArray[np.float32]:
            return (rng.standard_normal((rows, columns)) / np.sqrt(columns)).astype(np.float32)

        made = {
            "token_embd.weight": matrix(len(self.words), self.hidden) * 4,
            "output_norm.weight": (1 + 0.1 * rng.standard_normal(self.hidden)).astype(np.float32),
        }
        if not self.tied:
            made["output.weight"] = matrix(len(self.words), self.hidden) * 4
        for layer in range(self.layers):
            at = f"blk.{layer}"
            for norm in ("attn_norm", "ffn_norm"):
                made[f"{at}.{norm}.weight"] = (1 + 0.1 * rng.standard_normal(self.hidden)).astype(np.float32)
            made[f"{at}.attn_q.weight"] = matrix(self.heads * self.head_dim, self.hidden) * 2
            made[f"{at}.attn_k.weight"] = matrix(self.kv_heads * self.head_dim, self.hidden) * 2
            made[f"{at}.attn_v.weight"] = matrix(self.kv_heads * self.head_dim, self.hidden)
            made[f"{at}.attn_output.weight"] = matrix(self.hidden, self.heads * self.head_dim)
            made[f"{at}.ffn_gate.weight"] = matrix(self.ffn, self.hidden)
            made[f"{at}.ffn_up.weight"] = matrix(self.ffn, self.hidden)
            made[f"{at}.ffn_down.weight"] = matrix(self.hidden, self.ffn)
        return made

    def write_gguf(self, path: Path, quantization: gguf.GGMLQuantizationType | None = None) -> Path:
        """Write the file as llama.cpp's own converter does: rows of q and k interleaved in each head."""
        writer = gguf.GGUFWriter(str(path), "llama")
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context_tokens)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.ffn)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_rope_freq_base(self.rope_base)
        writer.add_rope_dimension_count(self.head_dim)
        writer.add_layer_norm_rms_eps(self.epsilon)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(self.words)
        writer.add_token_types([3, 3, 3] + [1] * (len(self.words) - 3))
        writer.add_token_merges(["h e", "he l", "Ġ t"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
        for name, value in self.weights().items():
            if "attn_q" in name or "attn_k" in name:
                heads = self.heads if "attn_q" in name else self.kv_heads
                value = value.reshape(heads, 2, self.head_dim // 2, -1).swapaxes(1, 2).reshape(value.shape)
            if quantization is not None and value.ndim == 2:
                writer.add_tensor(name, gguf.quants.quantize(value, quantization), raw_dtype=quantization)
            else:
                writer.add_tensor(name, value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def logits(
        self, token_ids: list[int], rounded: Callable[[str, NDArray[np.float32]], NDArray[np.float32]]
    ) -> NDArray[np.float64]:
        """Compute the last position's logits. ``rounded`` stands for what the file's storage does to a matrix."""
        w = {name: (rounded(name, v) if v.ndim == 2 else v).astype(np.float64) for name, v in self.weights().items()}
        x = w["token_embd.weight"][token_ids]
        count, half = len(token_ids), self.head_dim // 2
        angles = np.arange(count)[:, None] * self.rope_base ** (-np.arange(half) / half)[None, :]
        cos, sin = np.cos(angles), np.sin(angles)

        def norm(value: NDArray[np.float64], gain: NDArray[np.float64]) -> NDArray[np.float64]:
            return value / np.sqrt((value**2).mean(-1, keepdims=True) + self.epsilon) * gain

        def heads_of(value: NDArray[np.float64], heads: int, rotate: bool) -> NDArray[np.float64]:
            split = value.reshape(count, heads, self.head_dim).swapaxes(0, 1)
            if rotate:
                left, right = split[..., :half], split[..., half:]
                split = np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)
            return np.repeat(split, self.heads // heads, axis=0)

        for layer in range(self.layers):
            at = f"blk.{layer}"
            h = norm(x, w[f"{at}.attn_norm.weight"])
            q = heads_of(h @ w[f"{at}.attn_q.weight"].T, self.heads, True)
            k = heads_of(h @ w[f"{at}.attn_k.weight"].T, self.kv_heads, True)
            v = heads_of(h @ w[f"{at}.attn_v.weight"].T, self.kv_heads, False)
            scores = q @ k.swapaxes(1, 2) / np.sqrt(self.head_dim)
            scores[:, np.triu(np.ones((count, count), bool), 1)] = -np.inf
            chances = np.exp(scores - scores.max(-1, keepdims=True))
            chances /= chances.sum(-1, keepdims=True)
            attended = (chances @ v).swapaxes(0, 1).reshape(count, -1)
            x = x + attended @ w[f"{at}.attn_output.weight"].T
            h = norm(x, w[f"{at}.ffn_norm.weight"])
            gate = h @ w[f"{at}.ffn_gate.weight"].T
            x = x + (gate / (1 + np.exp(-gate)) * (h @ w[f"{at}.ffn_up.weight"].T)) @ w[f"{at}.ffn_down.weight"].T
        head = w["token_embd.weight"] if self.tied else w["output.weight"]
        return norm(x[-1], w["output_norm.weight"]) @ head.T


@pytest.fixture(scope="session")
def tiny_llama() -> TinyLlama:
    return TinyLlama()
