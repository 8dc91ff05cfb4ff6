"""Be the smallest decoders there are, in the formats that decoders come in, and computed in plain numpy."""

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from workers.artifacts import gguf_tokenizer


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
    architecture: str = "llama"
    """llama, qwen2 (biases of q, k and v) or qwen3 (heads of q and k are normalized)."""
    merges: tuple[str, ...] = ("h e", "he l", "Ġ t")

    @property
    def words(self) -> list[str]:
        merged = [merge.replace(" ", "") for merge in self.merges]
        letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
        return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "Ġ", "Ċ", *letters, *merged, *"0123456789"]

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
            if self.architecture == "qwen2":
                for part, heads in (("q", self.heads), ("k", self.kv_heads), ("v", self.kv_heads)):
                    made[f"{at}.attn_{part}.bias"] = rng.standard_normal(heads * self.head_dim).astype(np.float32)
            if self.architecture == "qwen3":
                for part in "qk":
                    gain = 1 + 0.3 * rng.standard_normal(self.head_dim)
                    made[f"{at}.attn_{part}_norm.weight"] = gain.astype(np.float32)
            made[f"{at}.attn_output.weight"] = matrix(self.hidden, self.heads * self.head_dim)
            made[f"{at}.ffn_gate.weight"] = matrix(self.ffn, self.hidden)
            made[f"{at}.ffn_up.weight"] = matrix(self.ffn, self.hidden)
            made[f"{at}.ffn_down.weight"] = matrix(self.hidden, self.ffn)
        return made

    def write_gguf(self, path: Path, quantization: gguf.GGMLQuantizationType | None = None) -> Path:
        """Write the file as llama.cpp's own converter does: rows of q and k interleaved in each head."""
        writer = gguf.GGUFWriter(str(path), self.architecture)
        writer.add_block_count(self.layers)
        writer.add_context_length(self.context_tokens)
        writer.add_embedding_length(self.hidden)
        writer.add_feed_forward_length(self.ffn)
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_rope_freq_base(self.rope_base)
        if self.architecture == "qwen3":
            writer.add_key_length(self.head_dim)
        else:
            writer.add_rope_dimension_count(self.head_dim)
        writer.add_layer_norm_rms_eps(self.epsilon)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("smollm")
        writer.add_token_list(self.words)
        writer.add_token_types([3, 3, 3] + [1] * (len(self.words) - 3))
        writer.add_token_merges(list(self.merges))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_chat_template("{% for message in messages %}{{ message['content'] }}{% endfor %}")
        for name, value in self.weights().items():
            if self.architecture == "llama" and ("attn_q" in name or "attn_k" in name):
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

    def write_folder(self, folder: Path, dtype: str = "F32") -> Path:
        """Write the Hugging Face folder of the same model. ``dtype`` BF16 cuts the weights to their upper halves."""
        folder.mkdir(parents=True, exist_ok=True)
        names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
        names |= {
            "attn_norm": "input_layernorm",
            "ffn_norm": "post_attention_layernorm",
            "attn_output": "self_attn.o_proj",
        }
        names |= {f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"}
        names |= {f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"}
        names |= {f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")}
        header: dict[str, Any] = {}
        data = b""
        for name, value in self.weights().items():
            *at, part, kind = name.split(".")
            theirs = ".".join([*(["model.layers", at[1]] if at else []), names[part], kind])
            raw = value.tobytes() if dtype == "F32" else (value.view(np.uint32) >> 16).astype(np.uint16).tobytes()
            header[theirs] = {
                "dtype": dtype,
                "shape": list(value.shape),
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + data)
        config = {
            "model_type": self.architecture,
            "hidden_act": "silu",
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "vocab_size": len(self.words),
            "max_position_embeddings": self.context_tokens,
            "rope_theta": self.rope_base,
            "rms_norm_eps": self.epsilon,
            "tie_word_embeddings": self.tied,
            "eos_token_id": 2,
        }
        (folder / "config.json").write_text(json.dumps(config))
        gguf_tokenizer.convert_tokenizer(self.write_gguf(folder / "of_tokenizer.gguf"), folder / "tokenizer.json")
        (folder / "of_tokenizer.gguf").unlink()
        template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
        said = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": template}
        (folder / "tokenizer_config.json").write_text(json.dumps(said))
        return folder

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
            parts = {part: h @ w[f"{at}.attn_{part}.weight"].T + w.get(f"{at}.attn_{part}.bias", 0.0) for part in "qkv"}
            for part in "qk":
                gain = w.get(f"{at}.attn_{part}_norm.weight")
                if gain is not None:
                    parts[part] = norm(parts[part].reshape(count, -1, self.head_dim), gain).reshape(count, -1)
            q = heads_of(parts["q"], self.heads, True)
            k = heads_of(parts["k"], self.kv_heads, True)
            v = heads_of(parts["v"], self.kv_heads, False)
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
